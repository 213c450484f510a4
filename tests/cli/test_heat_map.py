"""The CKA matrix in the terminal shows every value in its place."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
from checkpoints import QUICK, run_cli, save_tiny
from rich.color import Color
from rich.text import Text

from sglp_llm.cli.heat_map import heat_map
from sglp_llm.records import Segment, SimilarityMatrix

SEGMENTS = (Segment(0, 2), Segment(2, 7))
COLUMNS = [0, 1, 3, 4, 5, 6, 7]
"""Where the layers stand: there is a gap between the segments."""


def random_cka(layers: int) -> SimilarityMatrix:
    values = torch.rand(layers, layers, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return SimilarityMatrix(((values + values.T) / 2).fill_diagonal_(1), "cosine")


def brightness(color: Color | None) -> float:
    assert color is not None
    red, green, blue = color.get_truecolor()
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def colour_of(line: Text, column: int, upper: bool) -> Color | None:
    """The colour of one of the two cells that a character shows."""
    at = line.plain.index("▀") if column == 0 and "▀" in line.plain else 5
    (span,) = [span for span in line.spans if span.start == at + column]
    assert not isinstance(span.style, str)
    return span.style.color if upper else span.style.bgcolor


def test_shades_are_the_rounded_values_and_marks_stand_below_removed_layers() -> None:
    cka = random_cka(7)
    *rows, marks, scale = heat_map(cka, SEGMENTS, [1, 5], 80, colours=False)
    least = float(cka.values.min())
    assert len(rows) == 8
    for layer, row in zip(range(7), [*rows[:2], *rows[3:]], strict=True):
        shown = [" ░▒▓█".index(row.plain.ljust(20)[5 + column]) for column in COLUMNS]
        assert shown == [round((float(cka.values[layer, other]) - least) / (1 - least) * 4) for other in range(7)]
    assert rows[2].plain.strip() == ""
    assert [row.plain[:4].strip() for row in rows] == ["0", "", "", "2", "", "", "", ""]
    assert [column for column, mark in enumerate(marks.plain[5:]) if mark == "x"] == [COLUMNS[1], COLUMNS[5]]
    assert scale.plain.startswith(f"CKA {least:.2f} ")


def test_half_blocks_are_brighter_where_layers_are_more_alike() -> None:
    cka = random_cka(7)
    *rows, _, _ = heat_map(cka, SEGMENTS, [], 80, colours=True)
    assert len(rows) == 4  # 7 layers and a gap, two in a line
    shown = []
    for index, layer in enumerate([0, 1, None, 2, 3, 4, 5, 6]):
        if layer is not None and index != 3:  # the row below the gap is drawn as a lower half
            line = rows[index // 2]
            shown += [
                (float(cka.values[layer, other]), brightness(colour_of(line, column, upper=index % 2 == 0)))
                for other, column in enumerate(COLUMNS)
            ]
    ordered = [light for _, light in sorted(shown)]
    assert all(low <= high + 1 for low, high in pairwise(ordered))  # 8 bits a channel
    assert ordered[-1] - ordered[0] > 100


def test_many_layers_share_cells_inside_their_segments() -> None:
    cka = random_cka(126)
    segments = (Segment(0, 4), Segment(4, 100), Segment(100, 126))
    lines = heat_map(cka, segments, [50], 60, colours=False)
    assert max(len(line.plain) for line in lines[:-1]) <= 60
    assert [line.plain[:4].strip() for line in lines[:-1] if line.plain[:4].strip()] == ["0", "4", "100"]
    assert lines[-2].plain.count("x") == 1


def test_analyze_draws_when_asked_and_not_into_a_file(tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path / "tiny")
    drawn = run_cli("analyze", tiny, *QUICK, "--draw")
    assert "x marks removed layers" in drawn.out
    assert "x marks removed layers" not in run_cli("analyze", tiny, *QUICK).out
    assert json.loads(run_cli("analyze", tiny, *QUICK, "--draw", "--json").out)["plan"]["similarity"]
    without = run_cli("analyze", tiny, *QUICK[2:], "--criterion", "bi", "--draw")
    assert "No CKA matrix" in without.out
