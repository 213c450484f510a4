"""A comparison as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from sglp_llm.records import Comparison


def write_tables(comparison: Comparison, folder: Path) -> None:
    """Writes ``compare.json``, ``compare.csv`` and ``compare.md``.

    Wall times stand in the JSON and in the Markdown file's last table only: everything else is the same however often the run
    was interrupted.
    """
    (folder / "compare.json").write_text(json.dumps(asdict(comparison), indent=2) + "\n", encoding="utf-8")
    (folder / "compare.csv").write_text(to_csv(comparison), encoding="utf-8")
    (folder / "compare.md").write_text(to_markdown(comparison), encoding="utf-8")


def to_csv(comparison: Comparison) -> str:
    """One line a criterion and depth, all numbers in full."""
    columns = _columns(comparison)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["criterion", "layers_removed", "ratio", "removed", *(f"{name} {key}" for name, key in columns)])
    writer.writerow(["dense", 0, 0.0, "", *_values(comparison.dense, columns)])
    for row in comparison.rows:
        removed = " ".join(map(str, row.removed))
        writer.writerow([row.criterion, len(row.removed), row.ratio, removed, *_values(row.results, columns)])
    return stream.getvalue()


def to_markdown(comparison: Comparison) -> str:
    """The table people read, sorted by depth and then as asked for, and the time each selection took."""
    columns = [(name, key) for name, key in _columns(comparison) if not key.endswith("standard_error")]
    lines = [
        f"# {Path(comparison.model).name}: {comparison.num_layers} decoder layers",
        "",
        "| criterion | removed | layers | " + " | ".join(f"{name} {key}" for name, key in columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
        _line("dense", "0", "", comparison.dense, columns),
    ]
    for row in sorted(comparison.rows, key=lambda row: len(row.removed)):
        layers = " ".join(map(str, row.removed))
        lines.append(_line(row.criterion, str(len(row.removed)), layers, row.results, columns))
    lines += ["", "| selection | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in comparison.selection_seconds.items()]
    return "\n".join(lines) + "\n"


def _columns(comparison: Comparison) -> list[tuple[str, str]]:
    return [(name, key) for name, numbers in comparison.dense.items() for key in numbers]


def _values(results: Mapping[str, Mapping[str, float]], columns: list[tuple[str, str]]) -> list[float]:
    return [results[name][key] for name, key in columns]


def _line(
    criterion: str, number: str, layers: str, results: Mapping[str, Mapping[str, float]], columns: list[tuple[str, str]]
) -> str:
    def shown(value: float, error: float | None) -> str:
        text = f"{value:.4g}" if abs(value) < 1000 else f"{value:.3g}"
        return text if error is None else f"{text} ± {error:.2g}"

    cells = [shown(results[name][key], results[name].get(f"{key}_standard_error")) for name, key in columns]
    return f"| {criterion} | {number} | {layers} | " + " | ".join(cells) + " |"
