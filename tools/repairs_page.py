"""Writes docs/repairs.md from the comparisons of tools/repairs.sh: python tools/repairs_page.py FOLDER PAGE.

Rows of the page that no comparison in the folder has stay as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from healing_page import known_rows
from leaderboard_page import measured_on, pair

HEAD = """# What each repair gains

SmolLM2-135M-Instruct without 6 of its 30 layers, those that `angular` chooses, before and after each repair. Made by
`tools/repairs.sh DATA`, which has all settings: 64 calibration sequences of 256 tokens, half WikiText-2 train and half C4. Every
training takes 20,480 tokens of the same text and learns the original's predictions, unless its name ends in `mse` or `pair`.

- WikiText-2, C4: ln(perplexity / dense perplexity) on 64 windows of 512 tokens of text that nothing was calibrated or trained on.
- tasks: average over the nine tasks of the suite `offline`; the last lines say how many examples each.
- seconds: wall time of the compensation and of the training, on a machine that did other work too: compare sizes, not digits.
- gain a minute: how much the mean of the two texts falls from the cut alone, divided by that time.
- `seam` trains the two layers on each side of the cut; `seam-mse` does so on the squared error of the hidden states behind it
  (XMerge's objective), `seam-pair` on half of that and half of the divergence of the predictions (OverRep's).

"""
COLUMNS = ("WikiText-2", "C4", "tasks", "seconds", "gain a minute")
CUT = "cut alone"


def main() -> None:
    folder, page = map(Path, sys.argv[1:3])
    lines = page.read_text(encoding="utf-8").splitlines() if page.exists() else []
    rows = known_rows(lines)
    notes = [line for line in lines if line.startswith("Measured")]
    for file in sorted(folder.glob("*/compare.json")):
        comparison = json.loads(file.read_text(encoding="utf-8"))
        for row in comparison["rows"]:
            rows[_name(row["method"], file.parent.name)] = _cells(row)
        notes.append(measured_on(comparison))
    before = _gap(rows[CUT])
    table = [f"| repair | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for name in sorted(rows, key=lambda each: (each != CUT, _gap(rows[each]))):
        seconds = rows[name][3]
        paid = f"{(before - _gap(rows[name])) / float(seconds) * 60:.3f}" if seconds else ""
        table.append(f"| `{name}` | {' | '.join([*rows[name][:4], paid])} |")
    page.write_text(HEAD + "\n".join([*table, "", *dict.fromkeys(notes)]) + "\n", encoding="utf-8")


def _name(method: str, kind: str) -> str:
    """``refit, then seam`` for the method ``angular+refit+heal`` of the comparison ``seam``."""
    parts = [part for part in method.split("+")[1:] if part not in ("none", "heal")]
    if method.endswith("+heal"):
        parts.append(kind)
    return ", then ".join(parts) or CUT


def _cells(row: dict[str, Any]) -> list[str]:
    texts = [each for each in row["results"].values() if "perplexity" in each]
    (tasks,) = (each for each in row["results"].values() if "perplexity" not in each)
    seconds = row["compensation_seconds"]
    return [*(pair(each, "log_gap") for each in texts), pair(tasks, "average"), f"{seconds:.0f}" if seconds else ""]


def _gap(cells: list[str]) -> float:
    return sum(float(cell.split()[0]) for cell in cells[:2]) / 2


if __name__ == "__main__":
    main()
