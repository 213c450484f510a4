"""Tables of the measurements of `tools/carry_over.sh`: ln(perplexity / dense perplexity), in Markdown."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TEXTS = {"wikitext2_test": "WikiText-2", "c4_sample": "C4", "alpaca_rest": "Alpaca"}
PLAIN = "readings"
# The label; then, alone and in segments, where the row is: the comparison's folder and the method.
READINGS = [
    ("the layer's gradient norm (`gradnorm`)", (PLAIN, "gradnorm"), (PLAIN, "sglp")),
    ("mean of its tensors' gradient norms", ("reading-tensors", "gradnorm"), ("reading-tensors", "sglp")),
    ("gradient norm / weight norm", ("reading-relative", "gradnorm"), ("reading-relative", "sglp")),
    *(
        (
            f"norm of the model without the layer, {best} is best",
            (f"reading-without-{best}", "gradnorm_without"),
            (f"reading-without-{best}-segments", "gradnorm_without"),
        )
        for best in ("largest", "smallest")
    ),
    ("gate on the layer's output, first order", ("reading-gate-1", "gate"), ("reading-gate-1-segments", "gate")),
    ("gate on the layer's output, first and second order", (PLAIN, "gate"), ("reading-gate-2-segments", "gate")),
]


def sections(folder: Path) -> str:
    """All studies that are finished in this folder, one section each."""
    studies: list[Callable[[Path], list[str]]] = [_depths, _ablation, _readings, _texts, _tokens, _seeds]
    return "\n".join(line for study in studies for line in study(folder))


def _depths(folder: Path) -> list[str]:
    found = _read(folder, "depths")
    if found is None:
        return []
    depths = sorted({len(row["removed"]) for row in found["rows"]})
    rows = []
    for text in _texts_of(found)[:2]:
        for method in _methods(found):
            own = [next(r for r in found["rows"] if r["method"] == method and len(r["removed"]) == n) for n in depths]
            rows.append([TEXTS[text], f"`{method}`", *(_gap(row, text) for row in own)])
    title = (
        "## Depths",
        "Protected ends (4, 2), 8k tokens of WikiText-2. `best` sees these 8k tokens too, not its usual 64k.",
    )
    return _section(*title, ["text", "method", *(f"{n} of 30 removed" for n in depths)], rows)


def _ablation(folder: Path) -> list[str]:
    found = _read(folder, "ablation")
    if found is None:
        return []
    rows = []
    for choice, what in (
        ("gradnorm", "GradNorm alone"),
        ("sglp", "+ CKA segments (the paper)"),
        ("sglp-search", "search"),
    ):
        cells = [what]
        for text in _texts_of(found)[:2]:
            for repair in ("", "+linear", "+learned"):
                cells.append(_gap(next(row for row in found["rows"] if row["method"] == choice + repair), text))
        rows.append(cells)
    head = [
        "choice of layers",
        *(f"{TEXTS[t]}, {r}" for t in _texts_of(found)[:2] for r in ("none", "linear", "learned")),
    ]
    title = "## What each part contributes", "6 of 30 layers, 8k tokens of WikiText-2; columns: the compensation."
    return _section(*title, head, rows)


def _readings(folder: Path) -> list[str]:
    rows, means = [], []
    for name, alone, segmented in READINGS:
        pair = [_row(folder, *alone), _row(folder, *segmented)]
        if None in pair:
            return []
        cells = [name]
        for row in pair:
            assert row is not None
            cells += [" ".join(map(str, row["removed"])), *(_gap(row, text) for text in list(TEXTS)[:2])]
        rows.append(cells)
        means.append([_mean_gap(row) for row in pair if row is not None])
    head = ["reading", "alone: removed", "WikiText-2", "C4", "in segments: removed", "WikiText-2", "C4"]
    title = "## Readings of GradNorm", "6 of 30 layers, 8k tokens of WikiText-2."
    best = []
    for column, words in enumerate(("alone", "in segments")):
        own = [each[column] for each in means]
        winner = own.index(min(own))
        best.append(f"{words}, {READINGS[winner][0]} ({own[winner]:.2f}, the layer's gradient norm {own[0]:.2f})")
    return [*_section(*title, head, rows), f"Least mean of both texts: {'; '.join(best)}.", ""]


def _texts(folder: Path) -> list[str]:
    names = {"wikitext": "WikiText-2", "c4": "C4", "alpaca": "Alpaca"}
    found = {name: _read(folder, f"text-{name}") for name in names}
    if None in found.values():
        return []
    rows = []
    for method in _methods(found["wikitext"]):
        cells = [f"`{method}`"]
        for comparison in found.values():
            row = next(row for row in comparison["rows"] if row["method"] == method)
            cells += [_gap(row, text, error=False) for text in TEXTS]
        rows.append(cells)
    head = ["method", *(f"{own} → {other}" for own in names.values() for other in TEXTS.values())]
    title = (
        "## Calibration texts",
        "6 of 30 layers, 8k tokens of the text before the arrow, measured on the one behind it.",
    )
    return _section(*title, head, rows)


def _tokens(folder: Path) -> list[str]:
    found = {8: _read(folder, "text-wikitext"), 32: _read(folder, "tokens-128"), 128: _read(folder, "tokens-512")}
    known = {thousands: comparison for thousands, comparison in found.items() if comparison is not None}
    if len(known) < 2:
        return []
    rows = []
    for method in _methods(next(iter(known.values()))):
        cells = [f"`{method}`"]
        for text in list(TEXTS)[:2]:
            for comparison in known.values():
                cells.append(_gap(next(row for row in comparison["rows"] if row["method"] == method), text))
        rows.append(cells)
    head = ["method", *(f"{text}, {thousands}k" for text in list(TEXTS.values())[:2] for thousands in known)]
    title = "## Calibration tokens", "6 of 30 layers, WikiText-2; trials see the first 1k tokens in every column."
    return _section(*title, head, rows)


def _seeds(folder: Path) -> list[str]:
    file = folder / "seeds" / "seeds.csv"
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        found = [row for row in csv.DictReader(lines) if row["number"] == "log_gap"]
    methods = list(dict.fromkeys(row["method"] for row in found))
    rows = []
    for method in methods:
        own = [row for row in found if row["method"] == method]
        spreads = [f"{float(row['mean']):.3f} ± {float(row['standard_deviation']):.3f}" for row in own]
        rows.append([f"`{method}`", own[0]["different_choices"], *spreads])
    title = (
        "## Seeds",
        "6 of 30 layers, five draws of 8k tokens of WikiText-2: mean ± standard deviation of the five, not a standard error.",
    )
    return _section(*title, ["method", "different choices", *list(TEXTS.values())[:2]], rows)


def _read(folder: Path, name: str) -> Any:
    file = folder / name / "compare.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _row(folder: Path, name: str, method: str) -> dict[str, Any] | None:
    found = _read(folder, name)
    return None if found is None else next(row for row in found["rows"] if row["method"] == method)


def _methods(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in found["rows"]))


def _texts_of(found: dict[str, Any]) -> list[str]:
    return [text for text in TEXTS if any(name.startswith(text) for name in found["dense"])]


def _mean_gap(row: dict[str, Any]) -> float:
    """The mean ``log_gap`` over the two texts that all studies measure on."""
    return sum(_numbers(row, text)["log_gap"] for text in list(TEXTS)[:2]) / 2


def _numbers(row: dict[str, Any], text: str) -> dict[str, float]:
    (found,) = (numbers for name, numbers in row["results"].items() if name.startswith(text))
    return found


def _gap(row: dict[str, Any], text: str, error: bool = True) -> str:
    numbers = _numbers(row, text)
    shown = f"{numbers['log_gap']:.3f}"
    return f"{shown} ± {numbers['log_gap_standard_error']:.3f}" if error else shown


def _section(title: str, words: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [title, "", words, "", *(f"| {' | '.join(line)} |" for line in lines), ""]
