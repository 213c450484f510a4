"""``python -m sglp_llm``."""

from sglp_llm.cli.main import main

main()
