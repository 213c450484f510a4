"""Comparisons that differ in the calibration seed, as one table of means and spreads."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev

from sglp_llm.records import Comparison


@dataclass(frozen=True)
class SeedSpread:
    """One number of a method at one depth over several calibration seeds.

    Attributes:
        method: The method.
        layers_removed: The depth.
        measurement: Name of the measurement.
        number: Name of the number.
        mean: Mean over seeds.
        standard_deviation: Standard deviation over seeds, not the standard error of the mean.
        different_choices: How many different sets of layers were chosen.
    """

    method: str
    layers_removed: int
    measurement: str
    number: str
    mean: float
    standard_deviation: float
    different_choices: int


def spreads(comparisons: Sequence[Comparison]) -> list[SeedSpread]:
    """Mean and standard deviation of every number over at least two comparisons of the same methods, depths and measurements."""
    found = []
    for rows in zip(*(comparison.rows for comparison in comparisons), strict=True):
        choices = len({row.removed for row in rows})
        for measurement, numbers in rows[0].results.items():
            for number in numbers:
                if number.endswith("standard_error"):
                    continue
                values = [row.results[measurement][number] for row in rows]
                depth = len(rows[0].removed)
                spread = fmean(values), stdev(values)
                found.append(SeedSpread(rows[0].method, depth, measurement, number, *spread, choices))
    return sorted(found, key=lambda each: each.layers_removed)


def write_seed_tables(found: Sequence[SeedSpread], seeds: Sequence[int], folder: Path) -> None:
    """Writes ``seeds.csv`` and ``seeds.md``."""
    with (folder / "seeds.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(SeedSpread)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, found))
    (folder / "seeds.md").write_text(seeds_to_markdown(found, seeds), encoding="utf-8")


def seeds_to_markdown(found: Sequence[SeedSpread], seeds: Sequence[int]) -> str:
    """The table in Markdown: one line per method and depth."""
    columns = list(dict.fromkeys((each.measurement, each.number) for each in found))
    cells: dict[tuple[int, str], dict[tuple[str, str], str]] = {}
    choices = {(each.layers_removed, each.method): each.different_choices for each in found}
    for each in found:
        text = f"{each.mean:.4g} ± {each.standard_deviation:.2g}"
        cells.setdefault((each.layers_removed, each.method), {})[each.measurement, each.number] = text
    lines = [
        f"Mean ± standard deviation over the calibration seeds {', '.join(map(str, seeds))}.",
        "",
        f"| method | removed | different choices | {' | '.join(f'{name} {number}' for name, number in columns)} |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for (depth, method), own in cells.items():
        values = " | ".join(own[column] for column in columns)
        lines.append(f"| {method} | {depth} | {choices[depth, method]} | {values} |")
    return "\n".join(lines) + "\n"
