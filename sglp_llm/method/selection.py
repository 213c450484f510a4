"""Turns scores, segments and a budget into the layers to remove."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from sglp_llm.errors import UserError
from sglp_llm.method.staying import FREE, Staying
from sglp_llm.records import Budget, Segment
from sglp_llm.sizes import parse_bytes, parse_latency


@dataclass(frozen=True)
class Target:
    """A limit for the shortened model: the fewest layers that reach it are removed.

    Attributes:
        said: The limit as the user gave it, with its name.
        limit: The limit.
        left: What the model has without the given layers; every layer adds its own share to it.
        show: What is left, as the end of a sentence.
    """

    said: str
    limit: float
    left: Callable[[Sequence[int]], float]
    show: Callable[[float], str]

    def reached_without(self, removed: Sequence[int]) -> bool:
        """Whether the model without these layers is within the limit."""
        return self.left(removed) <= self.limit


def layers_to_remove(
    wanted: Budget | Target,
    segments: Sequence[Segment],
    scores: Sequence[float],
    protect: tuple[int, int] = (0, 0),
    staying: Staying = FREE,
) -> tuple[int, ...]:
    """Spreads the budget over the segments and removes the layers with the lowest scores inside each.

    Args:
        wanted: How much to remove: a ratio or a number of layers, or what is to be reached.
        segments: A partition of the layers; one segment of all layers when there is no segmentation.
        scores: One score per layer, larger = keep.
        protect: Number of protected layers at the front and at the end.
        staying: Which layers must stay.

    Returns:
        Indices of the removed layers, ascending.

    Raises:
        UserError: The budget removes no layer, or more than can be removed.
    """
    capacity = sum(segment_capacities(segments, protect, staying))
    capacity = min(capacity, _capacity(len(scores), protect, len(segments), staying))
    if isinstance(wanted, Budget):
        return lowest_scores(
            number_to_remove(wanted, len(scores), capacity, staying), segments, scores, protect, staying
        )
    removed: tuple[int, ...] = ()
    for n in range(1, capacity + 1):
        removed = lowest_scores(n, segments, scores, protect, staying)
        if wanted.reached_without(removed):
            return removed
    raise _unreachable(wanted, removed)


def set_to_remove(
    wanted: Budget | Target,
    num_layers: int,
    choose: Callable[[int, Sequence[int]], Sequence[int]],
    protect: tuple[int, int] = (0, 0),
    staying: Staying = FREE,
) -> tuple[int, ...]:
    """The layers to remove for a criterion that chooses whole sets.

    Args:
        wanted: As for `layers_to_remove`.
        num_layers: Number of decoder layers.
        choose: Takes a number of layers and the removable layers; returns the layers to remove.
        protect: Number of protected layers at the front and at the end.
        staying: Which layers must stay; ``choose`` respects it too.

    Returns:
        Indices of the removed layers, in the criterion's own order.

    Raises:
        UserError: The budget removes no layer, or more than can be removed.
    """
    removable = removable_layers(num_layers, protect, staying)
    capacity = _capacity(num_layers, protect, staying=staying)
    if isinstance(wanted, Budget):
        return tuple(choose(number_to_remove(wanted, num_layers, capacity, staying), removable))
    largest = _largest_first(wanted, removable)
    for n in range(1, capacity + 1):
        if wanted.reached_without(largest[:n]):  # otherwise no n layers can reach the target
            removed = tuple(choose(n, removable))
            if wanted.reached_without(removed):
                return removed
    raise _unreachable(wanted, largest[:capacity])


def check_target(
    target: Target,
    num_layers: int,
    protect: tuple[int, int] = (0, 0),
    segments: int = 1,
    staying: Staying = FREE,
) -> None:
    """Rejects, before layers are chosen, a target that the whole model reaches, or that no choice of layers can reach.

    Args:
        target: What is to be reached.
        num_layers: Number of decoder layers.
        protect: Number of protected layers at the front and at the end.
        segments: Least number of segments.
        staying: Which layers must stay.

    Raises:
        UserError: It is one of these; the message says what the whole model has, or the least that can be left.
    """
    if target.reached_without(()):
        raise UserError(f"{target.said} removes no layer: with all layers kept, {target.show(target.left(()))}")
    largest = _largest_first(target, removable_layers(num_layers, protect, staying))
    largest = largest[: _capacity(num_layers, protect, segments, staying)]
    if not target.reached_without(largest):
        raise _unreachable(target, largest)


def check_budget(
    budget: Budget,
    num_layers: int,
    protect: tuple[int, int] = (0, 0),
    segments: int = 1,
    staying: Staying = FREE,
) -> None:
    """Rejects, before any work is done, a budget that no segmentation into ``segments`` or more segments could meet.

    Raises:
        UserError: Not exactly one field of the budget is given, it is out of range, or it removes too few or too many layers.
    """
    given = budget.to_dict()
    if len(given) != 1:
        *names, last = (each.name for each in fields(Budget))
        raise UserError(f"give exactly one of {', '.join(names)} and {last}, not {' and '.join(given) or 'none'}")
    if min(protect) < 0:
        raise UserError(f"protect: the numbers of layers must not be negative, not {protect[0]} and {protect[1]}")
    if budget.ratio is not None and not 0 < budget.ratio < 1:
        raise UserError(f"ratio {budget.ratio:g} must lie between 0 and 1, both excluded")
    if budget.ratio is not None or budget.drop is not None:
        number_to_remove(budget, num_layers, _capacity(num_layers, protect, segments, staying), staying)
    if budget.target_params is not None and budget.target_params < 1:
        raise UserError(f"target_params {budget.target_params} must be positive")
    if budget.target_memory is not None:
        parse_bytes(budget.target_memory)
    if budget.target_latency is not None:
        parse_latency(budget.target_latency)


def number_to_remove(budget: Budget, num_layers: int, capacity: int, staying: Staying = FREE) -> int:
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
        why = "; ".join(["one a segment and the protected layers stay", *staying.lines])
        raise UserError(f"{said} removes {n}; at most {capacity} can go ({why})")
    return n


def segment_capacities(
    segments: Sequence[Segment], protect: tuple[int, int] = (0, 0), staying: Staying = FREE
) -> list[int]:
    """How many layers can be removed from each segment: at most all but one, and no protected layer."""
    depth = segments[-1].stop
    return [min(len(segment) - 1, len(_removable(segment, depth, protect, staying))) for segment in segments]


def removable_layers(num_layers: int, protect: tuple[int, int] = (0, 0), staying: Staying = FREE) -> range:
    """The layers that are not protected. If none is protected, all but one of them can be removed."""
    return _removable(Segment(0, num_layers), num_layers, protect, staying)


def spread(n: int, capacities: Sequence[int]) -> list[int]:
    """Splits n in proportion to the capacities by largest remainder, in exact arithmetic; ties go to the earlier segment."""
    total = sum(capacities)
    shares = [n * capacity // total for capacity in capacities]
    by_remainder = sorted(range(len(capacities)), key=lambda index: (-(n * capacities[index] % total), index))
    for index in by_remainder[: n - sum(shares)]:
        shares[index] += 1
    return shares


def lowest_scores(
    n: int,
    segments: Sequence[Segment],
    scores: Sequence[float],
    protect: tuple[int, int] = (0, 0),
    staying: Staying = FREE,
) -> tuple[int, ...]:
    """The n layers to remove: in each segment its share of the lowest scores; ties go to the lower index.

    Where layers must stay, they are removed one by one: each time the lowest score among those that can go next, in segments
    that have not given their share, or, where none can go there, in the others. Where the kept ones must keep a pattern, the sum
    of the scores is the least, wherever the segments are.

    Raises:
        UserError: So many cannot go.
    """
    capacities = segment_capacities(segments, protect, staying)
    candidates = [_removable(segment, segments[-1].stop, protect, staying) for segment in segments]
    if staying.pattern[0]:
        return staying.least(n, scores, [layer for layers in candidates for layer in layers])
    removed: list[int] = []
    if not staying:
        for layers, share in zip(candidates, spread(n, capacities), strict=True):
            removed += sorted(layers, key=lambda layer: (scores[layer], layer))[:share]
        return tuple(sorted(removed))
    shares = spread(n, capacities)
    while len(removed) < n:
        giving = [_left(layers, share, removed) for layers, share in zip(candidates, shares, strict=True)]
        within = [_left(layers, most, removed) for layers, most in zip(candidates, capacities, strict=True)]
        among = staying.can_follow(removed, [layer for layers in giving for layer in layers])
        among = among or staying.following(removed, [layer for layers in within for layer in layers], f"drop {n}")
        removed.append(min(among, key=lambda layer: (scores[layer], layer)))
    return tuple(sorted(removed))


def _left(layers: Sequence[int], most: int, removed: Sequence[int]) -> Sequence[int]:
    """The layers of a segment that can still go, when it gives so many at most."""
    return layers if sum(layer in layers for layer in removed) < most else ()


def _unreachable(target: Target, removed: Sequence[int]) -> UserError:
    return UserError(
        f"{target.said} cannot be reached: with the {len(removed)} layers that can go removed, "
        f"{target.show(target.left(removed))}"
    )


def _largest_first(target: Target, layers: Sequence[int]) -> list[int]:
    return sorted(layers, key=lambda layer: target.left((layer,)))


def _capacity(num_layers: int, protect: tuple[int, int], segments: int = 1, staying: Staying = FREE) -> int:
    """How many layers can be removed at most, from so many segments."""
    whole = [Segment(0, num_layers)]
    most = min(sum(segment_capacities(whole, protect, staying)), num_layers - segments)
    return min(most, staying.most(removable_layers(num_layers, protect, staying))) if staying else most


def _removable(segment: Segment, num_layers: int, protect: tuple[int, int], staying: Staying) -> range:
    first, last = protect
    # What must always stay are first and last layers, so that the others have no gaps.
    while first < num_layers and first in staying.always:
        first += 1
    while last < num_layers and num_layers - 1 - last in staying.always:
        last += 1
    start = max(segment.start, first)
    return range(start, max(start, min(segment.stop, num_layers - last)))
