"""Proposals against every set there is."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from sglp_llm.method.proposals import distance_of, layers_in, neighbours, propose, runs_of
from sglp_llm.records import Segment

SETS = st.frozensets(st.integers(0, 12))


def runs_by_hand(layers: frozenset[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


@given(SETS)
def test_runs_are_maximal_and_give_the_set_back(layers: frozenset[int]) -> None:
    assert [list(range(start, stop)) for start, stop in runs_of(layers)] == runs_by_hand(layers)
    assert layers_in(runs_of(layers)) == layers


@st.composite
def partitions(draw: st.DrawFn, depth: int) -> list[Segment]:
    cuts = sorted(draw(st.sets(st.integers(1, depth - 1), max_size=3))) if depth > 1 else []
    return [Segment(start, stop) for start, stop in zip([0, *cuts], [*cuts, depth], strict=True)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, range, list[Segment], list[list[float]], int]:
    """How many go, what may go, segments, distances that are exact in floating point and often equal, most runs."""
    depth = draw(st.integers(2, 8))
    segments = draw(partitions(depth))
    first = draw(st.integers(0, depth - 1))
    removable = range(first, draw(st.integers(first + 1, depth)))
    n = draw(st.integers(1, min(len(removable), depth - 1)))
    numbers = draw(st.lists(st.integers(0, 20), min_size=(depth + 1) ** 2, max_size=(depth + 1) ** 2))
    distances = [[number / 8 for number in numbers[row * (depth + 1) :][: depth + 1]] for row in range(depth + 1)]
    return n, removable, segments, distances, draw(st.integers(1, 4))


def allowed(layers: frozenset[int], segments: list[Segment], max_runs: int) -> bool:
    runs = runs_by_hand(layers)
    inside = [[run for run in runs if set(run) <= set(segment.layers)] for segment in segments]
    return (
        len(runs) <= max_runs
        and sum(map(len, inside)) == len(runs)
        and not any(set(segment.layers) <= layers for segment in segments)
    )


def best_by_hand(
    n: int, removable: range, segments: list[Segment], distances: list[list[float]], max_runs: int
) -> list[frozenset[int]]:
    def distance(layers: frozenset[int]) -> float:
        return sum(distances[run[0]][run[-1] + 1] for run in runs_by_hand(layers))

    everything = [frozenset(each) for each in combinations(removable, n)]
    for partition in (segments, [Segment(0, segments[-1].stop)]):
        if found := [each for each in everything if allowed(each, partition, max_runs)]:
            return sorted(found, key=lambda each: (distance(each), sorted(each)))
    raise AssertionError("one run of n layers is always allowed")


@given(problems(), st.integers(1, 90))
def test_proposals_are_the_best_unions_of_runs(
    problem: tuple[int, range, list[Segment], list[list[float]], int], count: int
) -> None:
    n, removable, segments, distances, max_runs = problem
    expected = best_by_hand(n, removable, segments, distances, max_runs)
    found = propose(n, removable, segments, distances, count, max_runs)
    assert found == expected[:count]
    assert [distance_of(each, distances) for each in found] == sorted(distance_of(each, distances) for each in found)


@given(problems(), st.data())
def test_neighbours_are_all_swaps_of_an_end(
    problem: tuple[int, range, list[Segment], list[list[float]], int], data: st.DataObject
) -> None:
    n, removable, segments, _, _ = problem
    layers = data.draw(st.sampled_from([frozenset(each) for each in combinations(removable, n)]))
    expected = []
    for other in map(frozenset, combinations(removable, n)):
        stays = layers - other
        is_end = all({layer - 1, layer + 1} - layers for layer in stays)
        emptied = [
            segment for segment in segments if set(segment.layers) <= other and not set(segment.layers) <= layers
        ]
        if len(stays) == 1 and is_end and not emptied:
            expected.append(other)
    assert neighbours(layers, removable, segments) == sorted(expected, key=sorted)


def test_segments_of_one_layer_stay_until_nothing_else_can_go() -> None:
    distances = [[float(stop - start) for stop in range(5)] for start in range(5)]
    singles = [Segment(layer, layer + 1) for layer in range(4)]
    assert propose(2, range(4), [*singles[:2], Segment(2, 4)], distances, 9) == [
        frozenset(each) for each in ([0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3])
    ]
    assert propose(1, range(4), [*singles[:2], Segment(2, 4)], distances, 9) == [frozenset({2}), frozenset({3})]


def test_a_deep_model_is_no_problem() -> None:
    distances = [[abs(stop - start) ** 0.5 for stop in range(127)] for start in range(127)]
    found = propose(60, range(1, 125), [Segment(0, 126)], distances, 24)
    assert found[0] == frozenset(range(1, 61))
    assert len(set(found)) == 24
