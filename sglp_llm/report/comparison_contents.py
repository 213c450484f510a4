"""What a report of a comparison shows, gathered from ``compare.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglp_llm.errors import UserError
from sglp_llm.plan.published import last_part, without_local_paths, without_paths
from sglp_llm.report.drawing import Tick, axis
from sglp_llm.report.numbers import shown
from sglp_llm.small_files import read_json

COMPARISON_FILE_NAME = "compare.json"
_WIDTH = 260.0
_NUMBERS = {"log_gap": "ln(perplexity / dense perplexity)", "average": "average over the tasks"}


@dataclass(frozen=True)
class Dot:
    """One method's number in a drawing.

    Attributes:
        method: The method.
        place: Of the number, in the drawing's units.
        low: Of the number minus its standard error.
        high: Of the number plus its standard error.
        label: What a reader sees when pointing at it.
    """

    method: str
    place: float
    low: float
    high: float
    label: str


@dataclass(frozen=True)
class Dots:
    """The numbers of all methods at one depth, one line each.

    Attributes:
        title: What was measured, and what the number is.
        width: Of the plotting area.
        dots: From the top to the bottom.
        ticks: Numbers below.
    """

    title: str
    width: float
    dots: Sequence[Dot]
    ticks: Sequence[Tick]


@dataclass(frozen=True)
class MethodRow:
    """One method at one depth.

    Attributes:
        method: The method.
        removed: Indices of the removed layers.
        cells: Its numbers as text, one for every column.
        seconds: Wall time of its compensation and training as text; empty without.
    """

    method: str
    removed: tuple[int, ...]
    cells: tuple[str, ...]
    seconds: str


@dataclass(frozen=True)
class Depth:
    """All methods without one number of layers.

    Attributes:
        count: Number of removed layers.
        rows: One per method, the best first by the first measurement.
        drawings: One per measurement.
    """

    count: int
    rows: Sequence[MethodRow]
    drawings: Sequence[Dots]


@dataclass(frozen=True)
class ComparisonContents:
    """Everything in the report of a comparison.

    Attributes:
        name: Of the model.
        num_layers: Of the model.
        columns: Titles of the numbers.
        dense: The dense model's numbers as text.
        depths: Fewest removed layers first.
        seconds: What selected layers, and its wall time as text.
        settings: Names and values.
        versions: Names and versions.
    """

    name: str
    num_layers: int
    columns: Sequence[str]
    dense: Sequence[str]
    depths: Sequence[Depth]
    seconds: Sequence[tuple[str, str]]
    settings: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]


def gather_comparison(folder: Path) -> ComparisonContents:
    """Reads a folder of `compare`.

    Raises:
        UserError: Its ``compare.json`` is damaged.
    """
    file = folder / COMPARISON_FILE_NAME
    data = read_json(file, "comparison")
    try:
        return _contents(data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: damaged, or not written by sglp-llm: run compare again") from error


def _contents(data: Mapping[str, Any]) -> ComparisonContents:
    dense = data["dense"]
    keys = [(name, key) for name in dense for key in ("perplexity", "log_gap", "average") if key in dense[name]]
    judged = [(name, key) for name, key in keys if key in _NUMBERS]
    depths = []
    for count in sorted({len(row["removed"]) for row in data["rows"]}):
        rows = [row for row in data["rows"] if len(row["removed"]) == count]
        rows.sort(key=lambda row: _order(row["results"], judged))
        depths.append(Depth(count, [_row(row, keys) for row in rows], [_dots(rows, name, key) for name, key in judged]))
    return ComparisonContents(
        name=last_part(data["model"]),
        num_layers=int(data["num_layers"]),
        columns=[f"{without_paths(name)}: {key.replace('_', ' ')}" for name, key in keys],
        dense=[_cell(dense[name], key) for name, key in keys],
        depths=depths,
        seconds=[(name, f"{float(value):.1f}") for name, value in data["selection_seconds"].items()],
        settings=[(key, json.dumps(without_local_paths(value, key))) for key, value in data["settings"].items()],
        versions=[(key, str(value)) for key, value in data["versions"].items()],
    )


def _order(results: Mapping[str, Mapping[str, float]], judged: Sequence[tuple[str, str]]) -> float:
    """Less is better; 0 for all where nothing can be compared."""
    if not judged:
        return 0.0
    name, key = judged[0]
    return -results[name][key] if key == "average" else results[name][key]


def _row(row: Mapping[str, Any], keys: Sequence[tuple[str, str]]) -> MethodRow:
    seconds = float(row["compensation_seconds"])
    cells = tuple(_cell(row["results"][name], key) for name, key in keys)
    return MethodRow(str(row["method"]), tuple(map(int, row["removed"])), cells, f"{seconds:.0f}" if seconds else "")


def _cell(numbers: Mapping[str, float], key: str) -> str:
    error = numbers.get(f"{key}_standard_error")
    return shown(float(numbers[key]), None if error is None else float(error))


def _dots(rows: Sequence[Mapping[str, Any]], name: str, key: str) -> Dots:
    found = []
    for row in rows:
        numbers = row["results"][name]
        value, error = float(numbers[key]), float(numbers.get(f"{key}_standard_error") or 0.0)
        if math.isfinite(value) and math.isfinite(error):
            found.append((str(row["method"]), value, error))
    across, ticks = axis([end for _, value, error in found for end in (value - error, value + error)], _WIDTH)
    dots = [
        Dot(method, across(value), across(value - error), across(value + error), f"{method}: {shown(value, error)}")
        for method, value, error in found
    ]
    return Dots(f"{without_paths(name)}: {_NUMBERS[key]}", _WIDTH, dots, ticks)
