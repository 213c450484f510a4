"""A comparison as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from sglp_llm.records import Comparison, Pair
from sglp_llm.report.comparison_contents import COMPARISON_FILE_NAME
from sglp_llm.report.numbers import shown


def write_tables(comparison: Comparison, folder: Path) -> None:
    """Writes ``compare.json``, ``compare.csv``, ``pairs.csv`` and ``compare.md``.

    Wall times are in the JSON and in the last tables of the Markdown file only: everything else is the same however often the
    run was interrupted.
    """
    (folder / COMPARISON_FILE_NAME).write_text(json.dumps(asdict(comparison), indent=2) + "\n", encoding="utf-8")
    (folder / "compare.csv").write_text(to_csv(comparison), encoding="utf-8")
    (folder / "pairs.csv").write_text(pairs_to_csv(comparison), encoding="utf-8")
    (folder / "compare.md").write_text(to_markdown(comparison), encoding="utf-8")


def to_csv(comparison: Comparison) -> str:
    """One line per method and depth, numbers in full precision."""
    columns = _columns(comparison)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = (f"{name} {key}" for name, key in columns)
    writer.writerow(["method", "layers_removed", "ratio", "removed", *names, "plan"])
    writer.writerow(["dense", 0, 0.0, "", *_values(comparison.dense, columns), ""])
    for row in comparison.rows:
        removed = " ".join(map(str, row.removed))
        values = _values(row.results, columns)
        writer.writerow([row.method, len(row.removed), row.ratio, removed, *values, row.plan])
    return stream.getvalue()


def pairs_to_csv(comparison: Comparison) -> str:
    """One line per pair, numbers in full precision."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [field.name for field in fields(Pair)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(pair) for pair in comparison.pairs)
    return stream.getvalue()


def to_markdown(comparison: Comparison) -> str:
    """The tables in Markdown: numbers, sorted by depth and then in the requested order; pairs; wall times."""
    columns = [(name, key) for name, key in _columns(comparison) if not key.endswith("standard_error")]
    lines = [
        f"# {Path(comparison.model).name}: {comparison.num_layers} decoder layers",
        "",
        "| method | removed | layers | " + " | ".join(f"{name} {key}" for name, key in columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
        _line("dense", "0", "", comparison.dense, columns),
    ]
    rows = sorted(comparison.rows, key=lambda row: len(row.removed))
    for row in rows:
        layers = " ".join(map(str, row.removed))
        lines.append(_line(row.method, str(len(row.removed)), layers, row.results, columns))
    if comparison.pairs:
        lines += _pairs(comparison)
    lines += ["", "| selection | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in comparison.selection_seconds.items()]
    if any(row.compensation_seconds for row in rows):
        lines += ["", "| compensation | removed | seconds |", "|---|---|---|"]
        lines += [
            f"| {row.method} | {len(row.removed)} | {row.compensation_seconds:.1f} |"
            for row in rows
            if row.compensation_seconds
        ]
    return "\n".join(lines) + "\n"


def _pairs(comparison: Comparison) -> list[str]:
    lines = [
        "",
        "Against the best single criterion of the same depth, without search or compensation (the best on these very windows or "
        "tasks): the difference of log perplexity, or of the average, and what is left of the gap to the dense model.",
        "",
        "| removed | measured on | method | best single criterion | difference | gap / best gap |",
        "|---|---|---|---|---|---|",
    ]
    for pair in comparison.pairs:
        difference = shown(pair.difference, pair.difference_standard_error)
        ratio = "" if pair.gap_ratio is None else shown(pair.gap_ratio, pair.gap_ratio_standard_error)
        cells = (str(pair.layers_removed), pair.measurement, pair.method, pair.best, difference, ratio)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _columns(comparison: Comparison) -> list[tuple[str, str]]:
    return [(name, key) for name, numbers in comparison.dense.items() for key in numbers]


def _values(results: Mapping[str, Mapping[str, float]], columns: list[tuple[str, str]]) -> list[float]:
    return [results[name][key] for name, key in columns]


def _line(
    method: str, number: str, layers: str, results: Mapping[str, Mapping[str, float]], columns: list[tuple[str, str]]
) -> str:
    cells = [shown(results[name][key], results[name].get(f"{key}_standard_error")) for name, key in columns]
    return f"| {method} | {number} | {layers} | " + " | ".join(cells) + " |"
