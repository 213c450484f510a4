"""Which hidden states are compared, and training by them, against plain forward passes of the two models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import Tiny, tiny_model, token_ids

from sglp_llm import drop_layers
from sglp_llm.calibration.training import TrainingSequences
from sglp_llm.errors import UserError
from sglp_llm.healing.keeping import Run, Training
from sglp_llm.healing.matching import matched_in, matched_layers, outputs_of
from sglp_llm.healing.teacher import OnlineTeacher
from sglp_llm.healing.trained import make_trainable
from sglp_llm.healing.training import train
from sglp_llm.models.loading import wrap_model
from sglp_llm.plan import plan_from_indices
from sglp_llm.plan.healing_recipe import HealingRecipe

SEAM = HealingRecipe(train="seam", seam_layers=1, hidden_weight=1.0)


@pytest.mark.parametrize(
    ("removed", "changes", "expected"),
    [
        # 0 1 . . 4 5: behind the cut layer 4 is trained, and its output is that of layer 4.
        ((2, 3), {}, ((2, 4),)),
        # Only the layer before is trained: its output is to be that of the last removed layer.
        ((2, 3), {"seam_side": "before"}, ((1, 3),)),
        ((2, 3), {"train": "full"}, ((1, 3),)),
        ((2, 3), {"train": "partial", "seam_layers": 2}, ((3, 5),)),
        # 0 . 2 . 4 5: what is trained behind the first cut makes up for the second one too.
        ((1, 3), {}, ((1, 3), (2, 4))),
        # Nothing is left behind the cut.
        ((4, 5), {}, ((3, 5),)),
        # The first layers are missing: the first one that is left is trained.
        ((0, 1), {}, ((0, 2),)),
        ((2, 3), {"hidden_weight": 0.0}, ()),
    ],
)
def test_which_layers_stand_for_which(
    removed: tuple[int, ...], changes: dict[str, object], expected: tuple[tuple[int, int], ...]
) -> None:
    assert matched_layers(plan_from_indices(6, removed), SEAM.with_changes(**changes)) == expected


def test_without_a_cut_to_compare_at() -> None:
    with pytest.raises(UserError, match=r"hidden_weight: there is no sglp_plan\.json"):
        matched_layers(None, SEAM)
    with pytest.raises(UserError, match="no layer before the cut"):
        matched_layers(plan_from_indices(6, (0, 1)), SEAM.with_changes(train="full"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_outputs_are_the_hidden_states_of_transformers(checkpointing: bool) -> None:
    model, ids = tiny_model(Tiny("llama", 0)), token_ids(3)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    layers = wrap_model(model).layers
    with outputs_of([layers[1], layers[3]]) as found:
        expected = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    assert len(found) == 2
    for states, number in zip(found, (1, 3), strict=True):
        torch.testing.assert_close(states, expected[number + 1])
    found[0].square().sum().backward()
    assert layers[0].self_attn.q_proj.weight.grad is not None
    assert layers[2].self_attn.q_proj.weight.grad is None


def healed(tmp_path: Path, recipe: HealingRecipe, steps: int) -> tuple[Training, torch.nn.Module]:
    plan = plan_from_indices(6, (2, 3))
    student, teacher = wrap_model(drop_layers(tiny_model(Tiny("llama", 0)), plan)), tiny_model(Tiny("llama", 0))
    ids = torch.randint(3, 300, (8, 16), generator=torch.Generator().manual_seed(3))
    text = TrainingSequences(ids, ids.clone(), "random", torch.zeros(len(ids)), "random")
    ready, online = make_trainable(student, recipe, plan), OnlineTeacher(wrap_model(teacher))
    matched = matched_in(student, online, matched_layers(plan, recipe))
    found = train(ready, online, text, range(6, 8), recipe, steps, Run(tmp_path, batch_size=2), matched)
    return found, student.model


@pytest.mark.parametrize("side", ["both", "before"])
def test_only_the_hidden_states_are_learned(side: str, tmp_path: Path) -> None:
    recipe = SEAM.with_changes(seam_side=side, learning_rate=3e-3, sequences=2, warmup_steps=0)
    found, model = healed(tmp_path, recipe, 20)
    held_out = torch.randint(3, 300, (8, 16), generator=torch.Generator().manual_seed(3))[6:]
    ours, theirs = {"both": (3, 5), "before": (2, 4)}[side]
    untouched = drop_layers(tiny_model(Tiny("llama", 0)), plan_from_indices(6, (2, 3)))
    losses = []
    for student in (untouched, model):
        with torch.no_grad():
            own = student(input_ids=held_out, use_cache=False, output_hidden_states=True).hidden_states[ours]
            other = tiny_model(Tiny("llama", 0))(input_ids=held_out, output_hidden_states=True).hidden_states[theirs]
        apart = (own - other)[:, :-1].square().sum(-1) / other[:, :-1].square().sum(-1)
        losses.append(float(apart.mean()))
    assert found.before["loss"] == found.before["hidden_state_loss"] == pytest.approx(losses[0], rel=1e-4)
    assert found.after["hidden_state_loss"] == pytest.approx(losses[1], rel=1e-3)
    assert losses[1] < 0.98 * losses[0]
    assert {"divergence", "next_token_loss"} <= found.before.keys()
    changed = {
        name.split(".")[2]
        for name, value in model.named_parameters()
        if not torch.equal(value, untouched.get_parameter(name))
    }
    assert changed == ({"1", "2"} if side == "both" else {"1"})


def test_all_three_losses_have_their_weights(tmp_path: Path) -> None:
    recipe = HealingRecipe(train="full", hidden_weight=0.25, alpha=0.4, learning_rate=1e-3, sequences=2)
    found, _ = healed(tmp_path, recipe, 2)
    parts = found.before
    expected = 0.25 * parts["hidden_state_loss"] + 0.75 * (0.4 * parts["divergence"] + 0.6 * parts["next_token_loss"])
    assert parts["loss"] == pytest.approx(expected, rel=1e-5)
