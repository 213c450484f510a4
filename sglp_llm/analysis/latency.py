"""How many layers to remove for a decode time: a line through the times at a few depths, and the fewest layers on it."""

from __future__ import annotations

from statistics import linear_regression

from sglp_llm.analysis.decisions import check_selection
from sglp_llm.errors import UserError
from sglp_llm.method.selection import Target, check_target
from sglp_llm.method.staying import FREE, Staying
from sglp_llm.plan import Recipe
from sglp_llm.records import DecodeTimes
from sglp_llm.sizes import parse_latency


def drop_for_latency(recipe: Recipe, times: DecodeTimes, staying: Staying = FREE) -> int:
    """The fewest layers to remove for the recipe's ``target_latency``.

    Decode time is taken as linear in the depth: every layer reads its own weights and cache, and what is outside of them stays.
    A target of ``0.8x`` is relative to the whole model on that line.

    Args:
        recipe: For the target, the protected layers and the number of segments.
        times: Measured at two depths or more, the whole model's among them.
        staying: Which layers must stay.

    Raises:
        UserError: The whole model is as fast, no choice of layers is, or the times do not fall with the depth.
    """
    assert recipe.target_latency is not None
    depth = max(times.depths)
    per_layer, fixed = linear_regression(times.depths, times.seconds)
    if per_layer <= 0:
        measured = ", ".join(
            f"{seconds * 1e3:.3g} ms with {layers} layers"
            for layers, seconds in zip(times.depths, times.seconds, strict=True)
        )
        raise UserError(
            f"target_latency {recipe.target_latency}: decode time does not fall with the number of layers ({measured}): "
            "is the machine busy? Give a ratio or a number of layers"
        )
    whole = fixed + per_layer * depth
    value, unit = parse_latency(recipe.target_latency)
    target = Target(
        said=f"target_latency {recipe.target_latency}",
        limit=value * whole if unit == "x" else value / 1e3,
        left=lambda removed: fixed + per_layer * (depth - len(removed)),
        show=lambda seconds: (
            f"decoding takes {seconds * 1e3:.3g} ms a token, {seconds / whole:.3f}x of the whole model"
        ),
    )
    check_target(target, depth, (recipe.protect.first, recipe.protect.last), staying=staying)
    drop = next(n for n in range(1, depth) if target.reached_without(range(n)))
    check_selection(recipe.with_changes(drop=drop), depth, staying)
    return drop
