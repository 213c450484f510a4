"""Which sets of layers are worth a trial: unions of few runs of consecutive layers that change the representation little."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

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
    """The ``count`` sets of ``n`` layers with the least distance, by dynamic programming over the k best.

    A run lies inside one segment, whose layers are alike, and leaves it at least one layer; where no set of ``n`` layers can
    do that, segments do not bind.

    Args:
        n: How many layers go.
        removable: Layers that may go.
        segments: The partition of all layers.
        distances: ``[L + 1][L + 1]``: between what enters layer ``i`` and what enters layer ``j``.
        count: How many sets.
        max_runs: Most runs in a set.

    Returns:
        At most ``count`` sets, the least distance first, ties by their layers.
    """
    within = _best_unions(n, removable, segments, distances, count, max_runs)
    return within or _best_unions(n, removable, [Segment(0, segments[-1].stop)], distances, count, max_runs)


def _best_unions(
    n: int,
    removable: range,
    segments: Sequence[Segment],
    distances: Sequence[Sequence[float]],
    count: int,
    max_runs: int,
) -> list[frozenset[int]]:
    segment_of = {layer: segment for segment in segments for layer in segment.layers}

    @lru_cache(None)
    def best(first: int, left: int, runs: int) -> list[tuple[float, tuple[Run, ...]]]:
        """The least ways to remove ``left`` layers from ``first`` on in at most so many runs."""
        if left == 0:
            return [(0.0, ())]
        if runs == 0 or first >= removable.stop:
            return []
        ways = [best(first + 1, left, runs)]
        segment = segment_of[first]
        for stop in range(first + 1, min(first + left, removable.stop, segment.stop) + 1):
            if stop - first == len(segment):
                break  # nothing of the segment would be left
            own = distances[first][stop]
            # One layer must stay between two runs, or they would be one.
            rest = best(stop + 1, left - (stop - first), runs - 1)
            ways.append([(own + cost, ((first, stop), *others)) for cost, others in rest])
        return heapq.nsmallest(count, (way for several in ways for way in several))

    # Two runs of one segment may still take all of it but the layer between them, and that one stays: no segment is emptied.
    return [layers_in(runs) for _, runs in best(removable.start, n, max_runs)]


def neighbours(layers: frozenset[int], removable: range, segments: Sequence[Segment]) -> list[frozenset[int]]:
    """Every set that differs by one swap: an end of a run stays, and a layer beside a run, or one alone, goes instead.

    Args:
        layers: The set.
        removable: Layers that may go.
        segments: None of them is emptied.

    Returns:
        Different sets of as many layers, sorted.
    """
    ends = {layer for start, stop in runs_of(layers) for layer in (start, stop - 1)}
    found = set()
    for end in ends:
        for layer in removable:
            if layer not in layers:
                found.add(layers - {end} | {layer})
    whole = [frozenset(segment.layers) for segment in segments]
    return sorted((each for each in found if not any(segment <= each for segment in whole)), key=sorted)
