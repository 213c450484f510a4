"""Candidate sets of layers for the search: unions of a few runs of consecutive layers that change the hidden states little."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice

from sglp_llm.records import Segment

Run = tuple[int, int]
"""A run of consecutive layers ``[start, stop)``."""


def runs_of(layers: Collection[int]) -> tuple[Run, ...]:
    """The maximal runs of consecutive layers in a set, front to back."""
    ordered = sorted(layers)
    starts = [layer for layer in ordered if layer - 1 not in layers]
    stops = [layer + 1 for layer in ordered if layer + 1 not in layers]
    return tuple(zip(starts, stops, strict=True))


def layers_in(runs: Iterable[Run]) -> frozenset[int]:
    """The set of all layers in some runs."""
    return frozenset(layer for start, stop in runs for layer in range(start, stop))


def distance_of(layers: Collection[int], distances: Sequence[Sequence[float]]) -> float:
    """The distance of a set of layers: the sum of ``distances[start][stop]`` over its runs."""
    return sum(distances[start][stop] for start, stop in runs_of(layers))


def propose(
    n: int,
    removable: range,
    segments: Sequence[Segment],
    distances: Sequence[Sequence[float]],
    count: int,
    max_runs: int = 3,
) -> list[frozenset[int]]:
    """The ``count`` sets of ``n`` layers with the least distance (`distance_of`).

    Each run is inside one segment, whose layers are similar, and a segment keeps at least one layer. If no set of ``n`` layers
    satisfies this, segments are ignored.

    Args:
        n: Number of layers to remove; at most ``len(removable)``, and less than the number of layers.
        removable: Layers that may be removed.
        segments: The partition of all layers.
        distances: ``[L + 1][L + 1]``, between the hidden states that enter layer ``i`` and those that enter layer ``j``.
        count: Maximum number of sets.
        max_runs: Maximum number of runs in a set.

    Returns:
        At most ``count`` sets, by increasing distance; ties are broken by layer indices.
    """
    for partition in (segments, [Segment(0, segments[-1].stop)]):
        if found := list(islice(_unions(n, removable, partition, distances, max_runs), count)):
            return found
    return []


def _unions(
    n: int, removable: range, segments: Sequence[Segment], distances: Sequence[Sequence[float]], max_runs: int
) -> Iterator[frozenset[int]]:
    """Every allowed set of ``n`` layers, by increasing distance: best-first (A*) search with an exact bound on the rest."""
    segment_of = {layer: segment for segment in segments for layer in segment.layers}
    # No run covers a whole segment. Two runs in one segment have a kept layer between them, so they do not empty it either.
    runs = {
        start: [
            (stop, distances[start][stop])
            for stop in range(start + 1, min(removable.stop, segment_of[start].stop, start + n) + 1)
            if stop - start < len(segment_of[start])
        ]
        for start in removable
    }
    least = _least(n, removable, runs, max_runs)
    # (lower bound on the distance, layers so far, distance so far, layers left, runs left, first layer that may begin a run).
    # Ties are broken by layer indices.
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
    """``[runs][left][first]``: the least distance of ``left`` layers from ``first`` on, in at most ``runs`` runs."""
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
    """Every set that differs by one swap: a layer at the end of a run is kept, and any kept layer is removed instead.

    Args:
        layers: The set of removed layers.
        removable: Layers that may be removed.
        segments: A swap must not remove the last kept layer of a segment.

    Returns:
        Distinct sets of the same size, sorted.
    """
    ends = {layer for start, stop in runs_of(layers) for layer in (start, stop - 1)}
    found = {layers - {end} | {layer} for end in ends for layer in removable if layer not in layers}
    kept = [segment for segment in map(_layers_of, segments) if not segment <= layers]
    return sorted((each for each in found if not any(segment <= each for segment in kept)), key=sorted)


def _layers_of(segment: Segment) -> frozenset[int]:
    return frozenset(segment.layers)
