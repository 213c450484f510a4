"""The coordinates of a drawing."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from sglp_llm.report.drawing import chart, shade

NUMBERS = st.floats(-1e9, 1e9, allow_subnormal=False)


@given(values=st.lists(NUMBERS, min_size=1, max_size=40))
def test_points_keep_their_order_inside_the_area(values: list[float]) -> None:
    drawn = chart(list(enumerate(values)), ["" for _ in values], 100, 50)
    assert drawn is not None
    assert [mark.x for mark in drawn.marks] == sorted(mark.x for mark in drawn.marks)
    assert all(0 <= mark.x <= 100 and 0 <= mark.y <= 50 for mark in drawn.marks)
    for one, other in zip(drawn.marks, drawn.marks[1:], strict=False):
        lower, higher = values[drawn.marks.index(one)], values[drawn.marks.index(other)]
        assert (one.y >= other.y) == (lower <= higher) or one.y == other.y
    for ticks, length in ((drawn.x_ticks, 100), (drawn.y_ticks, 50)):
        assert len(ticks) <= 7
        assert all(-1 <= tick.place <= length + 1 for tick in ticks)


def test_what_is_not_finite_is_left_out() -> None:
    drawn = chart([(0, 1.0), (1, math.nan), (2, 3.0)], ["a", "b", "c"])
    assert drawn is not None
    assert [mark.label for mark in drawn.marks] == ["a", "c"]
    assert chart([(0, math.inf)], ["a"]) is None


def test_shades_are_ordered_in_brightness() -> None:
    def brightness(value: float) -> float:
        red, green, blue = (int(shade(value)[place : place + 2], 16) for place in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    steps = [brightness(number / 50) for number in range(51)]
    assert steps == sorted(steps)
    assert shade(-3) == shade(0) == shade(math.nan) == "#440154"
    assert shade(7) == shade(1)
