"""Layers in front of all that is trained run once for text that is seen again, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import Tiny, tiny_model

from sglp_llm import drop_layers
from sglp_llm.calibration.training import TrainingSequences
from sglp_llm.healing.keeping import Run
from sglp_llm.healing.remembered import FrozenFront
from sglp_llm.healing.teacher import OnlineTeacher
from sglp_llm.healing.trained import make_trainable
from sglp_llm.healing.training import train
from sglp_llm.models.loading import wrap_model
from sglp_llm.plan import plan_from_indices
from sglp_llm.plan.healing_recipe import HealingRecipe

PLAN = plan_from_indices(6, (4,))
SEAM = HealingRecipe(train="seam", seam_layers=1, learning_rate=3e-3, sequences=4, evaluations=6)
STEPS = 6
HELD_OUT = range(7, 10)
IDS = torch.randint(3, 300, (10, 16), generator=torch.Generator().manual_seed(0))
TEXT = TrainingSequences(IDS, IDS, "random", torch.zeros(10), "random")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_the_same_and_the_front_runs_once(
    family: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, tensors, logs = [], [], []
    recipe = SEAM.with_changes(gradient_checkpointing=checkpointing)
    for name in ("with", "without"):
        student = wrap_model(drop_layers(tiny_model(Tiny(family, 0)), PLAN))
        ready = make_trainable(student, recipe, PLAN)
        assert list(ready.front) == list(student.layers)[:3]
        passes: list[int] = []
        inside = next(module for module in student.layers[0].modules() if not list(module.children()))
        inside.register_forward_hook(lambda module, args, output, passes=passes: passes.append(len(output)))
        if name == "without":
            monkeypatch.setattr(FrozenFront, "__init__", _remembers_nothing)
        (tmp_path / name).mkdir()
        found = train(
            ready,
            OnlineTeacher(wrap_model(tiny_model(Tiny(family, 0)))),
            TEXT,
            HELD_OUT,
            recipe,
            STEPS,
            Run(tmp_path / name, batch_size=1),
        )
        runs.append(sum(passes))
        tensors.append(student.model.state_dict())
        logs.append([(line["step"], line.get("loss"), line.get("eval_loss")) for line in found.log])
    assert logs[0] == logs[1]
    for key, value in tensors[0].items():
        assert torch.equal(value, tensors[1][key]), key
    trained = len(IDS) - len(HELD_OUT)
    again = checkpointing  # it computes a layer once more in the backward pass
    assert runs == [len(IDS) + again * trained, STEPS * 4 * (1 + again) + (STEPS + 1) * len(HELD_OUT)]


def _remembers_nothing(self: FrozenFront, layers: object, numbers: object) -> None:
    self._layers = ()


@pytest.mark.parametrize("kind", ["full", "partial", "lora"])
def test_no_layers_are_in_front_where_the_embedding_or_every_layer_is_trained(kind: str) -> None:
    student = wrap_model(drop_layers(tiny_model(Tiny("llama", 1)), PLAN))
    assert student.model.config.tie_word_embeddings
    assert make_trainable(student, SEAM.with_changes(train=kind), PLAN).front == ()
