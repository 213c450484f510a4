"""Numbers to the coordinates of a drawing: what a template needs to write SVG without arithmetic of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_SHADES = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis
_TICKS = 5


@dataclass(frozen=True)
class Mark:
    """One point or cell of a drawing.

    Attributes:
        x: From the left, in the drawing's units.
        y: From the top.
        label: What a reader sees when pointing at it.
        segment: Number of the segment whose colour it has; ``None`` for none.
        is_removed: Whether the layer is removed.
        color: As ``#rrggbb``; empty where the style sheet says it.
    """

    x: float
    y: float
    label: str
    segment: int | None = None
    is_removed: bool = False
    color: str = ""


@dataclass(frozen=True)
class Tick:
    """A number beside an axis.

    Attributes:
        place: Along the axis, in the drawing's units.
        text: The number.
    """

    place: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Points over a number line.

    Attributes:
        width: Of the plotting area, in the drawing's units.
        height: Of the plotting area.
        marks: The points, from left to right.
        line: The points as SVG's ``points`` attribute.
        x_ticks: Beside the horizontal axis.
        y_ticks: Beside the vertical axis.
    """

    width: float
    height: float
    marks: tuple[Mark, ...]
    line: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def shade(value: float) -> str:
    """The colour of a number between 0 and 1, ``#rrggbb``; numbers outside are taken as the nearer end, and NaN as 0."""
    place = min(1.0, max(0.0, value)) * (len(_SHADES) - 1) if math.isfinite(value) else 0.0
    low = min(int(place), len(_SHADES) - 2)
    mixed = (round(a + (place - low) * (b - a)) for a, b in zip(_SHADES[low], _SHADES[low + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def chart(
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    width: float = 400,
    height: float = 150,
    segments: Sequence[int | None] | None = None,
    removed: Sequence[bool] | None = None,
) -> Chart | None:
    """Draws points; those that are not finite are left out. ``None`` without any.

    Args:
        points: ``(x, y)``, x ascending.
        labels: What is shown for each.
        width: Of the plotting area.
        height: Of the plotting area.
        segments: See `Mark`.
        removed: See `Mark`.
    """
    count = len(points)
    extras = zip(points, labels, segments or [None] * count, removed or [False] * count, strict=True)
    found = [each for each in extras if math.isfinite(each[0][0]) and math.isfinite(each[0][1])]
    if not found:
        return None
    xs, ys = [each[0][0] for each in found], [each[0][1] for each in found]
    across, x_ticks = axis(xs, width, whole=all(x == int(x) for x in xs))
    up, y_ticks = axis(ys, height)

    def down(place: float) -> float:
        return round(height - place, 2)

    marks = tuple(Mark(across(x), down(up(y)), label, segment, gone) for (x, y), label, segment, gone in found)
    return Chart(
        width,
        height,
        marks,
        " ".join(f"{mark.x},{mark.y}" for mark in marks),
        tuple(x_ticks),
        tuple(Tick(down(tick.place), tick.text) for tick in y_ticks),
    )


def axis(values: Sequence[float], length: float, whole: bool = False) -> tuple[Callable[[float], float], list[Tick]]:
    """A number line as long as the values need: where a value is on it, and the round numbers beside it.

    Args:
        values: Finite; without any the line goes from 0 to 1.
        length: Of the line, in the drawing's units.
        whole: Whether only whole numbers are shown beside it.
    """
    low, high = _range(values or [0.0, 1.0])

    def along(value: float) -> float:
        return round(length * (value - low) / (high - low), 2)

    return along, [Tick(along(value), f"{value:.4g}") for value in _ticks(low, high, whole)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    spare = abs(low) or 1.0
    return (low, high) if high > low else (low - spare / 2, high + spare / 2)


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers inside a range."""
    step = 10 ** math.floor(math.log10((high - low) / _TICKS))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= _TICKS)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]
