"""Writes docs/leaderboard.md from the comparisons of tools/leaderboard.sh: python tools/leaderboard_page.py FOLDER PAGE.

Rows of the page that no comparison in the folder has stay as they are.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from healing_page import known_rows
from machine import describe

HEAD = """# Leaderboard

Every preset and criterion on SmolLM2-135M-Instruct (30 decoder layers), alone and with the linear fold (`+linear`). Made by
`tools/leaderboard.sh DATA`, which has all settings: 64 calibration sequences of 256 tokens, half WikiText-2 train and half C4;
criteria that try removals do so on the first 4; the first 4 and the last 2 layers are protected (Shortened LLaMA's "+").

- WikiText-2, C4: ln(perplexity / dense perplexity) on text that nothing was calibrated or trained on, windows of 512 tokens, with
  the standard error of the paired differences. Rows are sorted by the mean of the two.
- tasks: average over the nine tasks of the suite `offline`. generation: average exact match of the suite `generation_offline`.
  repetition: its share of repeated 4-grams in free text, less is better. Measured in bfloat16.
- selection: wall seconds of the choice of layers; `shared` is one pass for all criteria that need no trials. repair: wall minutes
  of the fold and of the distillation. memory: the predicted peak of choice and fold, by `sglp-llm plan-memory`.
- Methods that remove the same layers are measured once. `removed` are indices in the original model.
"""
COLUMNS = ("WikiText-2", "C4", "tasks", "generation", "repetition", "selection s", "repair min", "memory GB", "removed")
DENSE = "dense"


def main() -> None:
    folder, page = map(Path, sys.argv[1:3])
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    found = {int(file.parent.name): json.loads(file.read_text()) for file in folder.glob("*/compare.json")}
    depths = {*found, *(int(part.split()[1]) for part in before.split("\n## ")[1:])}
    parts = [HEAD]
    for depth in sorted(depths):
        title = f"## Without {depth} layers"
        section = before.partition(title)[2].partition("\n## ")[0]
        rows, notes = (
            known_rows(section.splitlines()),
            [line for line in section.splitlines() if line.startswith("Measured")],
        )
        if depth in found:
            rows |= _measured(found[depth], folder / str(depth))
            notes.append(measured_on(found[depth]))
        parts.append(f"{title}\n\n{_table(rows)}\n" + "\n".join(dict.fromkeys(notes)) + "\n")
    page.write_text("\n".join(parts), encoding="utf-8")


def _measured(comparison: dict[str, Any], folder: Path) -> dict[str, list[str]]:
    rows = {DENSE: [*_numbers(comparison["dense"], True), "", "", "", ""]}
    seconds = comparison["selection_seconds"]
    for row in comparison["rows"]:
        settings = json.loads((folder / row["plan"] / "sglp_plan.json").read_text())["settings"]
        own = seconds.get(settings["criterion"])
        rows[row["method"]] = [
            *_numbers(row["results"], False),
            "shared" if own is None else f"{own:.0f}",
            f"{row['compensation_seconds'] / 60:.1f}" if row["compensation_seconds"] else "",
            f"{_memory(comparison['model'], settings['criterion'], settings['compensate']):.1f}",
            " ".join(map(str, row["removed"])),
        ]
    return rows


def _numbers(results: dict[str, dict[str, float]], dense: bool) -> list[str]:
    texts = [each for each in results.values() if "perplexity" in each]
    offline, generation = (each for each in results.values() if "perplexity" not in each)
    shown = [pair(each, "perplexity" if dense else "log_gap", ".2f" if dense else ".3f") for each in texts]
    return [
        *shown,
        pair(offline, "average"),
        pair(generation, "average"),
        pair(generation, "generation_open repetition"),
    ]


def pair(numbers: dict[str, float], key: str, form: str = ".3f") -> str:
    """A number of a comparison's row, and its standard error."""
    return f"{numbers[key]:{form}} ± {numbers[f'{key}_standard_error']:{form}}"


def _table(rows: dict[str, list[str]]) -> str:
    def place(name: str) -> float:
        return float("-inf") if name == DENSE else sum(float(cell.split()[0]) for cell in rows[name][:2])

    lines = [f"| method | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    lines += [f"| `{name}` | {' | '.join(rows[name])} |" for name in sorted(rows, key=place)]
    return "\n".join(lines) + "\n"


def measured_on(comparison: dict[str, Any]) -> str:
    """What a comparison was measured on, when, and by which commit."""
    names = ", ".join(comparison["dense"])
    passes = f"shared pass {comparison['selection_seconds'].get('shared pass', 0):.0f} s"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    made = f"{time.strftime('%Y-%m-%d')}, commit {commit or 'unknown'}"
    return f"Measured on {names}; {passes}; {made}; {describe()}."


@cache
def _memory(model: str, criterion: str, compensate: str) -> float:
    options = f"--criterion {criterion} --compensate {compensate} --samples 64 --seq-len 256 --trial-samples 4"
    command = f"-m sglp_llm plan-memory {options} --dtype float32 --json"
    told = subprocess.run([sys.executable, *command.split(), model], capture_output=True, text=True, check=True).stdout
    peak: int = json.loads(told)["engines"]["resident"]["host_peak"]
    return peak / 1e9


if __name__ == "__main__":
    main()
