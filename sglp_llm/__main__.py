"""``python -m sglp_llm``."""

from sglp_llm.cli import main

main()
