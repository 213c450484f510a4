"""Turns scores, segments and a budget into the layers to remove."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sglp_llm.errors import UserError
from sglp_llm.records import Budget, Segment


def layers_to_remove(
    budget: Budget,
    segments: Sequence[Segment],
    scores: Sequence[float],
    protect: tuple[int, int] = (0, 0),
    params_left: Callable[[tuple[int, ...]], int] | None = None,
) -> tuple[int, ...]:
    """Spreads the budget over the segments and removes the layers with the lowest scores inside each.

    Args:
        budget: How much to remove.
        segments: A partition of the layers; one segment of all layers when there is no segmentation.
        scores: One score per layer, larger = keep.
        protect: Number of protected layers at the front and at the end.
        params_left: Number of the model's parameters without the given layers; needed for ``target_params`` only.

    Returns:
        Indices of the removed layers, ascending.

    Raises:
        UserError: The budget removes no layer, or more than can be removed.
    """
    capacities = segment_capacities(segments, protect)
    if budget.target_params is None:
        return lowest_scores(number_to_remove(budget, len(scores), sum(capacities)), segments, scores, protect)
    assert params_left is not None
    for n in range(1, sum(capacities) + 1):
        removed = lowest_scores(n, segments, scores, protect)
        if params_left(removed) <= budget.target_params:
            return removed
    raise _unreachable(budget, sum(capacities), params_left(lowest_scores(sum(capacities), segments, scores, protect)))


def set_to_remove(
    budget: Budget,
    num_layers: int,
    choose: Callable[[int, Sequence[int]], Sequence[int]],
    protect: tuple[int, int] = (0, 0),
    params_left: Callable[[tuple[int, ...]], int] | None = None,
) -> tuple[int, ...]:
    """The layers to remove for a criterion that chooses whole sets.

    Args:
        budget: How much to remove.
        num_layers: Number of decoder layers.
        choose: Takes a number of layers and the removable layers; returns the layers to remove.
        protect: Number of protected layers at the front and at the end.
        params_left: As for `layers_to_remove`.

    Returns:
        Indices of the removed layers, in the criterion's own order.

    Raises:
        UserError: The budget removes no layer, or more than can be removed.
    """
    everything = [Segment(0, num_layers)]
    removable, capacity = _removable(everything[0], num_layers, protect), sum(segment_capacities(everything, protect))
    if budget.target_params is None:
        return tuple(choose(number_to_remove(budget, num_layers, capacity), removable))
    assert params_left is not None
    by_size = sorted(removable, key=lambda layer: params_left((layer,)))
    for n in range(1, capacity + 1):
        if params_left(tuple(by_size[:n])) <= budget.target_params:  # otherwise no n layers can reach the target
            removed = tuple(choose(n, removable))
            if params_left(removed) <= budget.target_params:
                return removed
    raise _unreachable(budget, capacity, params_left(tuple(by_size[:capacity])))


def check_budget(budget: Budget, num_layers: int, protect: tuple[int, int] = (0, 0), segments: int = 1) -> None:
    """Rejects, before any work is done, a budget that no segmentation into ``segments`` or more segments could meet.

    Raises:
        UserError: Not exactly one of ratio, drop and target_params is given, it is out of range, or it removes too few or too
            many layers.
    """
    given = budget.to_dict()
    if len(given) != 1:
        raise UserError(f"give exactly one of ratio, drop and target_params, not {' and '.join(given) or 'none'}")
    if min(protect) < 0:
        raise UserError(f"protect: the numbers of layers must not be negative, not {protect[0]} and {protect[1]}")
    if budget.ratio is not None and not 0 < budget.ratio < 1:
        raise UserError(f"ratio {budget.ratio:g} must lie between 0 and 1, both excluded")
    capacity = min(sum(segment_capacities([Segment(0, num_layers)], protect)), num_layers - segments)
    if budget.target_params is None:
        number_to_remove(budget, num_layers, capacity)
    elif budget.target_params < 1:
        raise UserError(f"target_params {budget.target_params} must be positive")


def number_to_remove(budget: Budget, num_layers: int, capacity: int) -> int:
    """``floor(ratio * L + 0.5)``, or ``drop``.

    Raises:
        UserError: It is 0 or larger than ``capacity``; the message gives the largest possible number.
    """
    if budget.ratio is not None:
        n, said = math.floor(budget.ratio * num_layers + 0.5), f"ratio {budget.ratio:g} of {num_layers} layers"
    else:
        assert budget.drop is not None
        n, said = budget.drop, f"drop {budget.drop} of {num_layers} layers"
    if n < 1:
        raise UserError(f"{said} removes no layer; at most {capacity} can go")
    if n > capacity:
        raise UserError(f"{said} removes {n}; at most {capacity} can go (one a segment and the protected layers stay)")
    return n


def segment_capacities(segments: Sequence[Segment], protect: tuple[int, int] = (0, 0)) -> list[int]:
    """How many layers can be removed from each segment: at most all but one, and no protected layer."""
    return [min(len(segment) - 1, len(_removable(segment, segments[-1].stop, protect))) for segment in segments]


def removable_layers(num_layers: int, protect: tuple[int, int] = (0, 0)) -> range:
    """The layers that are not protected. If none is protected, all but one of them can be removed."""
    return _removable(Segment(0, num_layers), num_layers, protect)


def spread(n: int, capacities: Sequence[int]) -> list[int]:
    """Splits n in proportion to the capacities by largest remainder, in exact arithmetic; ties go to the earlier segment."""
    total = sum(capacities)
    shares = [n * capacity // total for capacity in capacities]
    by_remainder = sorted(range(len(capacities)), key=lambda index: (-(n * capacities[index] % total), index))
    for index in by_remainder[: n - sum(shares)]:
        shares[index] += 1
    return shares


def lowest_scores(
    n: int, segments: Sequence[Segment], scores: Sequence[float], protect: tuple[int, int] = (0, 0)
) -> tuple[int, ...]:
    """The n layers to remove: in each segment its share of the lowest scores; ties go to the lower index."""
    removed: list[int] = []
    for segment, share in zip(segments, spread(n, segment_capacities(segments, protect)), strict=True):
        candidates = _removable(segment, segments[-1].stop, protect)
        removed += sorted(candidates, key=lambda layer: (scores[layer], layer))[:share]
    return tuple(sorted(removed))


def _unreachable(budget: Budget, capacity: int, least: int) -> UserError:
    return UserError(
        f"target_params {budget.target_params:,} cannot be reached: with the {capacity} layers that can go removed, "
        f"{least:,} parameters are left"
    )


def _removable(segment: Segment, num_layers: int, protect: tuple[int, int]) -> range:
    first, last = protect
    start = max(segment.start, first)
    return range(start, max(start, min(segment.stop, num_layers - last)))
