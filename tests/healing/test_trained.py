"""Which parameters are trained, and that what was learned ends in the plain model's own weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import REMOVED, Tiny, every_tiny, logits_of, tiny_model

from sglp_llm import drop_layers
from sglp_llm.errors import UserError
from sglp_llm.healing.trained import count_trained, layers_around, make_trainable, seams_of
from sglp_llm.models.loading import DecoderModel, wrap_model
from sglp_llm.plan import plan_from_indices
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.records import PrunePlan

EVERY_TINY = pytest.mark.parametrize("tiny", every_tiny(), ids=str)


def shortened(tiny: Tiny) -> tuple[DecoderModel, PrunePlan]:
    plan = plan_from_indices(tiny.depth, REMOVED)
    return wrap_model(drop_layers(tiny_model(tiny), plan)), plan


@given(
    st.integers(2, 12).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))
    )
)
def test_seams_are_where_neighbours_are_missing(case: tuple[int, set[int]]) -> None:
    depth, removed = case
    plan = plan_from_indices(depth, sorted(removed))
    expected = []
    for new in range(len(plan.kept) + 1):
        before = plan.kept[new - 1] if new > 0 else -1
        after = plan.kept[new] if new < len(plan.kept) else depth
        if set(range(before + 1, after)) & removed:
            expected.append(new)
    assert list(seams_of(plan)) == expected


def test_layers_on_both_sides() -> None:
    one, two = HealingRecipe(seam_layers=1), HealingRecipe(seam_layers=2)
    assert layers_around((3,), 8, two) == {1, 2, 3, 4}
    assert layers_around((0, 8), 8, one) == {0, 7}
    assert layers_around((2, 3), 8, one) == {1, 2, 3}
    assert layers_around((3,), 8, replace(two, seam_side="before")) == {1, 2}
    assert layers_around((3,), 8, replace(two, seam_side="behind")) == {3, 4}


@EVERY_TINY
def test_low_rank_adapters_are_merged(tiny: Tiny) -> None:
    model, plan = shortened(tiny)
    before = {name: each.clone() for name, each in model.model.named_parameters()}
    plain = logits_of(model.model)
    trained = make_trainable(model, HealingRecipe(train="lora", lora_rank=3), plan)
    learned = [parameter for parameter in trained.model.parameters() if parameter.requires_grad]
    assert trained.parameters == sum(each.numel() for each in learned)
    torch.testing.assert_close(logits_of(trained.model), plain)  # they begin as no change
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in learned:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    unmerged = logits_of(trained.model)
    assert not torch.allclose(unmerged, plain, atol=1e-3)
    merged = trained.merged()
    torch.testing.assert_close(logits_of(merged), unmerged, rtol=0, atol=1e-5 * float(unmerged.abs().max()))
    after = dict(merged.named_parameters())
    assert after.keys() == before.keys()
    assert {name for name, each in after.items() if not torch.equal(each, before[name])} == trained.changed


@EVERY_TINY
def test_full_is_everything(tiny: Tiny) -> None:
    model, plan = shortened(tiny)
    trained = make_trainable(model, HealingRecipe(train="full"), plan)
    assert trained.changed == {name for name, _ in model.model.named_parameters()}
    assert trained.parameters == sum(each.numel() for each in model.model.parameters())
    assert trained.merged() is model.model


@EVERY_TINY
def test_seam_is_the_layers_around_the_cuts(tiny: Tiny) -> None:
    model, plan = shortened(tiny)  # without 1 and 3: 0 | 2 | 4 5
    trained = make_trainable(model, HealingRecipe(train="seam", seam_layers=1), plan)
    layers = {0, 1, 2}
    expected = {
        f"{tiny.adapter.layers}.{layer}.{name}"
        for layer in layers
        for name, _ in model.layers[layer].named_parameters()
    }
    assert trained.changed == expected
    assert {name for name, each in model.model.named_parameters() if each.requires_grad} == expected


@EVERY_TINY
def test_partial_adds_the_end_of_the_model(tiny: Tiny) -> None:
    model, plan = shortened(tiny)
    recipe = HealingRecipe(train="partial", seam_layers=1, last_layers=1)
    trained = make_trainable(model, recipe, plan)
    assert f"{tiny.adapter.layers}.{model.num_layers - 1}." in str(sorted(trained.changed))
    head, lookup = model.model.get_output_embeddings(), model.model.get_input_embeddings()
    assert head.weight.requires_grad
    assert lookup.weight.requires_grad == (head.weight is lookup.weight)


def test_without_a_plan_nobody_knows_the_cuts() -> None:
    model, _ = shortened(Tiny("llama", 0))
    for train in ("seam", "partial"):
        with pytest.raises(UserError, match=f"train {train}: there is no sglp_plan.json"):
            make_trainable(model, HealingRecipe(train=train), None)
    assert make_trainable(model, HealingRecipe(train="full"), None).parameters


def test_half_precision_is_trained_in_float32() -> None:
    model, plan = shortened(Tiny("llama", 0))
    model.model.to(torch.bfloat16)
    trained = make_trainable(model, HealingRecipe(train="seam", seam_layers=1), plan)
    kinds = {(each.requires_grad, each.dtype) for each in trained.model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.float32), (False, torch.bfloat16)}
    linears = {module.weight for module in trained.model.modules() if isinstance(module, torch.nn.Linear)}
    assert {each for each in trained.model.parameters() if each.dtype == torch.bfloat16} < linears


@EVERY_TINY
@pytest.mark.parametrize("train", ["full", "partial", "seam", "lora"])
def test_what_would_be_trained_is_counted(tiny: Tiny, train: str) -> None:
    model, plan = shortened(tiny)
    recipe = HealingRecipe().with_changes(train=train, lora_rank=3)
    counted = count_trained(model, recipe, plan)
    assert counted == make_trainable(model, recipe, plan).parameters
