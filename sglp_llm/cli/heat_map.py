"""The CKA matrix as a picture of characters."""

from __future__ import annotations

from collections.abc import Sequence

from rich.style import Style
from rich.text import Text

from sglp_llm.records import Segment, SimilarityMatrix
from sglp_llm.report.drawing import shade

_SHADES = " ░▒▓█"
_MARGIN = 5

_Cell = tuple[int, ...]
"""The layers that a row or a column shows together; empty for the gap between two segments."""


def heat_map(
    similarity: SimilarityMatrix, segments: Sequence[Segment], removed: Sequence[int], width: int, colours: bool
) -> list[Text]:
    """Lines of text: two rows of the matrix a line in half blocks with colours, one a line in shades without.

    Between segments there is a gap; below the matrix the columns of removed layers are marked. Where the matrix is wider than the
    text, neighbouring layers of a segment share a cell, which shows their mean.

    Args:
        similarity: ``[layers, layers]``.
        segments: The partition of the layers; without one the whole depth is one segment.
        removed: Layers to mark.
        width: Columns of text.
        colours: Whether there are colours.
    """
    values = similarity.values.tolist()
    cells = _cells(segments or [Segment(0, len(values))], width - _MARGIN - 1)
    table = [[_mean(values, row, column) for column in cells] for row in cells]
    least = min(value for line in table for value in line if value is not None)
    lines = []
    step = 2 if colours else 1
    for first in range(0, len(cells), step):
        upper, lower = table[first], table[first + 1] if first + 1 < len(cells) else [None] * len(cells)
        named = next((cell[0] for cell in cells[first : first + step] if cell and _begins(cell, segments)), None)
        line = Text(f"{'' if named is None else named:>{_MARGIN - 1}} ", no_wrap=True)
        for above, below in zip(upper, lower, strict=True):
            if colours:
                line.append(
                    "▀" if above is not None else "▄" if below is not None else " ", _style(above, below, least)
                )
            else:
                line.append(" " if above is None else _SHADES[round(_scaled(above, least) * (len(_SHADES) - 1))])
        lines.append(line)
    gone = set(removed)
    marks = "".join("x" if gone & set(cell) else " " for cell in cells)
    lines.append(Text(f"{'':>{_MARGIN}}{marks}".rstrip(), no_wrap=True))
    scale = Text(f"CKA {least:.2f} ")
    for place in range(len(_SHADES) if not colours else 16):
        value = place / (len(_SHADES) - 1) if not colours else least + (1 - least) * place / 15
        scale.append(_SHADES[place] if not colours else "█", None if not colours else _style(value, None, least))
    lines.append(scale.append(" 1.00; x marks removed layers, gaps are the borders of segments"))
    return lines


def _cells(segments: Sequence[Segment], most: int) -> list[_Cell]:
    """At most ``most`` cells, as long as every segment can have one."""
    step = 1
    while True:
        cells: list[_Cell] = []
        for segment in segments:
            layers = list(segment.layers)
            cells += [()] if cells else []
            cells += [tuple(layers[at : at + step]) for at in range(0, len(layers), step)]
        if len(cells) <= most or step >= max(map(len, segments)):
            return cells
        step += 1


def _mean(values: list[list[float]], rows: _Cell, columns: _Cell) -> float | None:
    if not rows or not columns:
        return None
    return sum(values[row][column] for row in rows for column in columns) / (len(rows) * len(columns))


def _begins(cell: _Cell, segments: Sequence[Segment]) -> bool:
    return cell[0] == 0 or any(cell[0] == segment.start for segment in segments)


def _scaled(value: float, least: float) -> float:
    return 1.0 if least >= 1 else min(max((value - least) / (1 - least), 0.0), 1.0)


def _style(above: float | None, below: float | None, least: float) -> Style:
    if above is None:
        return Style() if below is None else Style(color=shade(_scaled(below, least)))
    return Style(color=shade(_scaled(above, least)), bgcolor=None if below is None else shade(_scaled(below, least)))
