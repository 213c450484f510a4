"""Layers to remove for a decode time, from given times: nothing is measured here."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglp_llm import UserError, replan
from sglp_llm.analysis.latency import drop_for_latency
from sglp_llm.plan import Recipe
from sglp_llm.records import DecodeTimes, PrunePlan

LINE = DecodeTimes((20, 15, 10), (0.030, 0.025, 0.020), "cpu")
"""10 ms, and 1 ms a layer."""


@pytest.mark.parametrize(
    ("target", "drop"),
    [("0.81x", 6), ("0.9x", 3), ("0.999x", 1), ("0.37x", 19), ("25.01ms", 5), ("29.999ms", 1), ("11.01ms", 19)],
)
def test_the_fewest_layers_on_the_line(target: str, drop: int) -> None:
    assert drop_for_latency(Recipe(target_latency=target), LINE) == drop


@settings(max_examples=200, deadline=None)
@given(fixed=st.floats(0, 1), per_layer=st.floats(0.001, 1), depth=st.integers(2, 60), share=st.floats(0.05, 0.99))
def test_one_layer_fewer_misses_the_target(fixed: float, per_layer: float, depth: int, share: float) -> None:
    def time(layers: int) -> float:
        return fixed + per_layer * layers

    depths = tuple(sorted({depth, max(1, depth // 2)}, reverse=True))
    times = DecodeTimes(depths, tuple(map(time, depths)), "cpu")
    recipe = Recipe(target_latency=f"{share:.6f}x")
    limit, rounding = round(share, 6) * time(depth), 1e-9 * time(depth)
    if time(1) > limit + rounding:
        with pytest.raises(UserError, match="cannot be reached"):
            drop_for_latency(recipe, times)
    elif time(1) < limit - rounding:
        drop = drop_for_latency(recipe, times)
        assert time(depth - drop) <= limit + rounding
        assert time(depth - drop + 1) > limit - rounding


def test_noise_around_the_line_is_averaged() -> None:
    noisy = DecodeTimes((20, 15, 10), (0.031, 0.023, 0.021), "cpu")  # the least squares line is LINE's
    for target in ("0.81x", "0.5x", "20.01ms"):
        assert drop_for_latency(Recipe(target_latency=target), noisy) == drop_for_latency(
            Recipe(target_latency=target), LINE
        )


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(target_latency="1x"), "target_latency 1x removes no layer: with all layers kept, decoding takes 30 ms"),
        (Recipe(target_latency="31ms"), "removes no layer: with all layers kept, decoding takes 30 ms a token, 1.000x"),
        (
            Recipe(target_latency="0.3x"),
            "cannot be reached: with the 19 layers that can go removed, decoding takes 11 ms",
        ),
        (
            Recipe(target_latency="0.5x", protect={"first": 6}),
            "with the 14 layers that can go removed, .* 16 ms a token",
        ),
        (Recipe(target_latency="0.4x", num_segments=3), "drop 18 of 20 layers removes 18; at most 17 can go"),
    ],
)
def test_refused(recipe: Recipe, message: str) -> None:
    recipe = Recipe().with_changes(**recipe.to_dict())
    with pytest.raises(UserError, match=message):
        drop_for_latency(recipe, LINE)


def test_times_that_do_not_fall_are_refused() -> None:
    flat = DecodeTimes((20, 10), (0.02, 0.02), "cpu")
    with pytest.raises(
        UserError, match=r"does not fall with the number of layers .20 ms with 20 layers, 20 ms with 10"
    ):
        drop_for_latency(Recipe(target_latency="0.8x"), flat)


def test_replan_says_that_it_needs_the_model() -> None:
    plan = PrunePlan(4, (0,), scores={"gradnorm": (1.0, 2.0, 3.0, 4.0)}, settings={"criterion": "gradnorm"})
    with pytest.raises(
        UserError, match=r"measured on the model itself; .*: sglp-llm analyze MODEL .*--target-latency 0.8x"
    ):
        replan(plan, target_latency="0.8x")
    assert replan(plan, drop=2).removed == (0, 1)
