"""Which sets of layers are worth a trial: unions of few runs of consecutive layers that change the representation little."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice

from sglp_llm.records import Segment

Run = tuple[int, int]
"""Consecutive layers ``[start, stop)``."""


def runs_of(layers: Collection[int]) -> tuple[Run, ...]:
    """The maximal runs of a set of layers, front to back."""
    ordered = sorted(layers)
    starts = [layer for layer in ordered if layer - 1 not in layers]
    stops = [layer + 1 for layer in ordered if layer + 1 not in layers]
    return tuple(zip(starts, stops, strict=True))


def layers_in(runs: Iterable[Run]) -> frozenset[int]:
    """The layers of some runs."""
    return frozenset(layer for start, stop in runs for layer in range(start, stop))


def distance_of(layers: Collection[int], distances: Sequence[Sequence[float]]) -> float:
    """How much a set's removal cuts out of the representation: the sum of ``distances[start][stop]`` over its runs."""
    return sum(distances[start][stop] for start, stop in runs_of(layers))


def propose(
    n: int,
    removable: range,
    segments: Sequence[Segment],
    distances: Sequence[Sequence[float]],
    count: int,
    max_runs: int = 3,
) -> list[frozenset[int]]:
    """The ``count`` sets of ``n`` layers with the least distance.

    A run lies inside one segment, whose layers are alike, and leaves it at least one layer; where no set of ``n`` layers can
    do that, segments do not bind.

    Args:
        n: How many layers go; at most ``len(removable)``, and fewer than there are layers.
        removable: Layers that may go.
        segments: The partition of all layers.
        distances: ``[L + 1][L + 1]``: between what enters layer ``i`` and what enters layer ``j``.
        count: How many sets.
        max_runs: Most runs in a set.

    Returns:
        At most ``count`` sets, the least distance first, ties by their layers.
    """
    for partition in (segments, [Segment(0, segments[-1].stop)]):
        if found := list(islice(_unions(n, removable, partition, distances, max_runs), count)):
            return found
    return []


def _unions(
    n: int, removable: range, segments: Sequence[Segment], distances: Sequence[Sequence[float]], max_runs: int
) -> Iterator[frozenset[int]]:
    """Every allowed set of ``n`` layers, the least distance first: best-first search, led by what the rest costs at least."""
    segment_of = {layer: segment for segment in segments for layer in segment.layers}
    # No run takes a segment whole. Two in one segment leave the layer between them, so together they empty none either.
    runs = {
        start: [
            (stop, distances[start][stop])
            for stop in range(start + 1, min(removable.stop, segment_of[start].stop, start + n) + 1)
            if stop - start < len(segment_of[start])
        ]
        for start in removable
    }
    least = _least(n, removable, runs, max_runs)
    # (distance at least, distance so far, layers so far, layers left, runs left, first layer that may begin a run); of equals
    # the one with the lower layers comes first.
    start = removable.start
    waiting: list[tuple[float, tuple[int, ...], float, int, int, int]] = [
        (least[max_runs][n][start], (), 0.0, n, max_runs, start)
    ]
    while waiting:
        bound, layers, so_far, left, runs_left, first = heapq.heappop(waiting)
        if left == 0:
            yield frozenset(layers)
        elif bound < math.inf:
            for begin in range(first, removable.stop):
                for stop, own in runs[begin]:
                    if stop - begin <= left:
                        rest, after = left - (stop - begin), min(stop + 1, removable.stop)
                        distance = so_far + own
                        at_least = distance + least[runs_left - 1][rest][after]
                        if at_least < math.inf:
                            more = (*layers, *range(begin, stop))
                            heapq.heappush(waiting, (at_least, more, distance, rest, runs_left - 1, after))


def _least(
    n: int, removable: range, runs: dict[int, list[tuple[int, float]]], max_runs: int
) -> list[list[dict[int, float]]]:
    """``[runs][left][first]``: the least distance of ``left`` layers from ``first`` on in at most so many runs."""
    least = [[dict.fromkeys(range(removable.start, removable.stop + 1), math.inf) for _ in range(n + 1)]]
    least[0][0] = dict.fromkeys(least[0][0], 0.0)
    for _ in range(max_runs):
        fewer, table = least[-1], [dict(least[0][0])]
        for left in range(1, n + 1):
            row = {removable.stop: math.inf}
            for first in reversed(removable):
                sums = (
                    own + fewer[left - (stop - first)][min(stop + 1, removable.stop)]
                    for stop, own in runs[first]
                    if stop - first <= left
                )
                row[first] = min(row[first + 1], min(sums, default=math.inf))
            table.append(row)
        least.append(table)
    return least


def neighbours(layers: frozenset[int], removable: range, segments: Sequence[Segment]) -> list[frozenset[int]]:
    """Every set that differs by one swap: an end of a run stays, and any layer that stayed goes instead.

    Args:
        layers: The set.
        removable: Layers that may go.
        segments: None of them is emptied that was not empty before.

    Returns:
        Different sets of as many layers, sorted.
    """
    ends = {layer for start, stop in runs_of(layers) for layer in (start, stop - 1)}
    found = {layers - {end} | {layer} for end in ends for layer in removable if layer not in layers}
    kept = [segment for segment in map(_layers_of, segments) if not segment <= layers]
    return sorted((each for each in found if not any(segment <= each for segment in kept)), key=sorted)


def _layers_of(segment: Segment) -> frozenset[int]:
    return frozenset(segment.layers)
