"""Budgets, the spread over segments, and the choice inside them, against exhaustive oracles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sglp_llm.errors import UserError
from sglp_llm.method.selection import (
    Target,
    check_budget,
    check_target,
    layers_to_remove,
    number_to_remove,
    segment_capacities,
    set_to_remove,
    spread,
)
from sglp_llm.records import Budget, Segment


@st.composite
def partitions(draw: st.DrawFn) -> list[Segment]:
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    stops = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    return [Segment(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]


@given(capacities=st.lists(st.integers(0, 12), min_size=1, max_size=6), data=st.data())
def test_spread_is_largest_remainder(capacities: list[int], data: st.DataObject) -> None:
    total = sum(capacities)
    assume(total > 0)
    n = data.draw(st.integers(1, total))
    shares = spread(n, capacities)
    assert sum(shares) == n
    quotas = [Fraction(n * capacity, total) for capacity in capacities]
    for share, quota, capacity in zip(shares, quotas, capacities, strict=True):
        assert math.floor(quota) <= share <= min(math.ceil(quota), capacity)
    # Whoever was rounded up had a remainder at least as large as whoever was not, and came first among equals.
    up = [
        (quota - math.floor(quota), -i)
        for i, (s, quota) in enumerate(zip(shares, quotas, strict=True))
        if s > math.floor(quota)
    ]
    down = [(q - math.floor(q), -i) for i, (s, q) in enumerate(zip(shares, quotas, strict=True)) if s == math.floor(q)]
    assert not up or not down or min(up) > max(down)


@given(segments=partitions(), first=st.integers(0, 4), last=st.integers(0, 4), data=st.data())
def test_removal_respects_segments_protection_and_scores(
    segments: list[Segment], first: int, last: int, data: st.DataObject
) -> None:
    layers = segments[-1].stop
    scores = data.draw(st.lists(st.integers(0, 5).map(float), min_size=layers, max_size=layers))
    free = {layer for layer in range(layers) if first <= layer < layers - last}
    capacities = [min(len(segment) - 1, len(free & set(segment.layers))) for segment in segments]
    assert segment_capacities(segments, (first, last)) == capacities
    assume(sum(capacities) > 0)
    n = data.draw(st.integers(1, sum(capacities)))
    removed = layers_to_remove(Budget(drop=n), segments, scores, (first, last))
    assert len(removed) == n
    assert set(removed) <= free
    for segment, share in zip(segments, spread(n, capacities), strict=True):
        inside = [layer for layer in segment.layers if layer in removed]
        assert len(inside) == share
        stay = [layer for layer in segment.layers if layer in free and layer not in removed]
        assert all((scores[gone], gone) < (scores[kept], kept) for gone in inside for kept in stay)


@pytest.mark.parametrize(
    ("ratio", "layers", "n"), [(0.25, 30, 8), (0.2, 32, 6), (0.25, 32, 8), (0.2, 28, 6), (0.1, 5, 1), (0.5, 4, 2)]
)
def test_ratio_is_rounded_half_up(ratio: float, layers: int, n: int) -> None:
    assert number_to_remove(Budget(ratio=ratio), layers, layers - 1) == n


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(ratio=0.0), "between 0 and 1"),
        (Budget(ratio=1.0), "between 0 and 1"),
        (Budget(ratio=-0.1), "between 0 and 1"),
        (Budget(ratio=math.nan), "between 0 and 1"),
        (Budget(ratio=0.01), "removes no layer; at most 9 can go"),
        (Budget(ratio=0.96), "removes 10; at most 9 can go"),
        (Budget(drop=0), "removes no layer; at most 9 can go"),
        (Budget(drop=-2), "removes no layer; at most 9 can go"),
        (Budget(drop=10), "removes 10; at most 9 can go"),
        (Budget(target_params=0), "must be positive"),
        (Budget(), "exactly one of ratio, drop, target_params, target_memory and target_latency, not none"),
        (
            Budget(ratio=0.5, drop=3),
            "target_memory and target_latency, not ratio and drop",
        ),
    ],
)
def test_impossible_budgets(budget: Budget, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_budget(budget, 10)


def test_protection_counts_against_the_budget() -> None:
    check_budget(Budget(drop=4), 10, (4, 2))
    with pytest.raises(UserError, match="at most 4 can go"):
        check_budget(Budget(drop=5), 10, (4, 2))
    with pytest.raises(UserError, match="must not be negative"):
        check_budget(Budget(drop=5), 10, (-1, 2))
    with pytest.raises(UserError, match="at most 0 can go"):
        check_budget(Budget(drop=1), 10, (10, 10))


def target(limit: int, left: Callable[[Sequence[int]], float]) -> Target:
    return Target(f"limit {limit}", limit, left, lambda count: f"{count} are left")


def test_a_target_removes_the_fewest_layers() -> None:
    segments, scores = [Segment(0, 3), Segment(3, 6)], [5.0, 1.0, 2.0, 9.0, 3.0, 4.0]

    def left(removed: Sequence[int]) -> int:
        return 100 - 10 * len(removed)

    assert layers_to_remove(target(85, left), segments, scores) == (1, 4)
    assert layers_to_remove(target(60, left), segments, scores) == (1, 2, 4, 5)
    with pytest.raises(
        UserError, match="limit 59 cannot be reached: with the 4 layers that can go removed, 60 are left"
    ):
        layers_to_remove(target(59, left), segments, scores)


def test_a_set_is_only_asked_for_where_so_many_layers_can_be_enough() -> None:
    sizes, asked = [10, 30, 20, 10, 10], []

    def choose(n: int, removable: Sequence[int]) -> list[int]:
        asked.append(n)
        return list(removable)[:n]

    def left(removed: Sequence[int]) -> int:
        return 80 - sum(sizes[layer] for layer in removed)

    for limit, removed, tried in ((40, (0, 1), [2]), (25, (0, 1, 2), [3]), (50, (0, 1), [1, 2])):
        asked.clear()
        assert set_to_remove(target(limit, left), 5, choose) == removed
        assert asked == tried
    asked.clear()
    with pytest.raises(UserError, match="with the 4 layers that can go removed, 10 are left"):
        set_to_remove(target(9, left), 5, choose)
    assert asked == []


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=7), limit=st.integers(0, 70), data=st.data())
def test_a_target_is_refused_early_where_no_set_reaches_it(sizes: list[int], limit: int, data: st.DataObject) -> None:
    first, last = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    segments = data.draw(st.integers(1, len(sizes)))

    def left(removed: Sequence[int]) -> int:
        return sum(sizes) - sum(sizes[layer] for layer in removed)

    free = range(first, max(first, len(sizes) - last))
    most = min(len(free), len(sizes) - segments)
    least = min(left(removed) for n in range(most + 1) for removed in combinations(free, n))
    if least <= limit < sum(sizes):
        check_target(target(limit, left), len(sizes), (first, last), segments)
        return
    text = "removes no layer: with all layers kept, " if sum(sizes) <= limit else "cannot be reached: with the "
    with pytest.raises(UserError, match=f"limit {limit} {text}"):
        check_target(target(limit, left), len(sizes), (first, last), segments)
