"""What the student writes while it is trained: lengths, determinism, and the distribution that it is drawn from."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_models import Tiny, tiny_model, token_ids

from sglp_llm import drop_layers
from sglp_llm.calibration.training import TrainingSequences
from sglp_llm.healing.keeping import Run, Training
from sglp_llm.healing.loss import IGNORED
from sglp_llm.healing.on_policy import continued, is_on_policy, new_tokens
from sglp_llm.healing.teacher import OnlineTeacher
from sglp_llm.healing.trained import make_trainable
from sglp_llm.healing.training import train
from sglp_llm.models.loading import wrap_model
from sglp_llm.plan import plan_from_indices
from sglp_llm.plan.healing_recipe import HealingRecipe

RECIPE = HealingRecipe(train="full", on_policy=1.0, beta=0.5, prompt_tokens=6, shortest=3, seq_len=16)


def written(numbers: list[int], step: int = 0, length: int = 5) -> dict[str, torch.Tensor]:
    ids = token_ids(3)[[number % 3 for number in numbers]]
    return continued(
        tiny_model(Tiny("llama", 0)), {"input_ids": ids, "sequence": torch.tensor(numbers)}, RECIPE, step, length
    )


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4, 1.0])
def test_the_share_of_steps(share: float) -> None:
    chosen = [step for step in range(20) if is_on_policy(HealingRecipe(on_policy=share), step)]
    assert len(chosen) == 20 * share
    assert all(later - earlier <= 1 / share + 1 for earlier, later in pairwise(chosen))


def test_from_few_tokens_to_all() -> None:
    lengths = [new_tokens(RECIPE, step, 11) for step in range(11)]
    assert (lengths[0], lengths[-1]) == (3, 10)
    assert lengths == sorted(lengths)
    assert new_tokens(RECIPE, 0, 1) == 3


def test_prompts_stay_and_are_not_predicted() -> None:
    found = written([0, 1, 2])
    assert torch.equal(found["input_ids"][:, :6], token_ids(3)[:, :6])
    assert found["input_ids"].shape == found["labels"].shape == (3, 11)
    assert (found["labels"][:, :6] == IGNORED).all()
    assert torch.equal(found["labels"][:, 6:], found["input_ids"][:, 6:])


def test_the_batch_changes_nothing_and_step_and_number_do() -> None:
    together, alone = written([0, 1, 2]), written([1])
    assert torch.equal(together["input_ids"][1], alone["input_ids"][0])
    assert not torch.equal(written([1], step=1)["input_ids"], alone["input_ids"])
    assert not torch.equal(written([4])["input_ids"], alone["input_ids"])


def test_it_is_a_sample_of_the_models_distribution() -> None:
    model = tiny_model(Tiny("llama", 0))
    numbers = [3 * number for number in range(3000)]  # all with the same prompt
    ids = token_ids(3)[:1].expand(len(numbers), -1)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # far from uniform
        expected = model(input_ids=ids[:1, :6]).logits[0, -1].softmax(-1)
    found = continued(model, {"input_ids": ids, "sequence": torch.tensor(numbers)}, RECIPE, 0, 1)["input_ids"][:, 6]
    counts = torch.bincount(found, minlength=len(expected)) / len(numbers)
    likely = expected > 0.01
    assert likely.sum() > 3
    error = (expected * (1 - expected) / len(numbers)).sqrt()
    assert ((counts - expected).abs()[likely] < 4 * error[likely]).all()


def test_nothing_is_predicted_after_the_end() -> None:
    model = tiny_model(Tiny("llama", 0))
    ids = token_ids(3)
    inputs = {"input_ids": ids, "sequence": torch.arange(3)}
    free = continued(model, inputs, RECIPE, 0, 8)["input_ids"]
    end = int(free[0, 8])
    model.generation_config.eos_token_id = end
    found = continued(model, inputs, RECIPE, 0, 8)
    row = found["labels"][0, 6:]
    assert int(row[2]) == end
    assert (row[:3] != IGNORED).all()
    assert (row[3:] == IGNORED).all()
    assert model.generation_config.eos_token_id == end


def trained(folder: Path, batch_size: int, kind: str) -> Training:
    folder.mkdir()
    plan = plan_from_indices(6, (2, 3))
    recipe = RECIPE.with_changes(learning_rate=3e-3, sequences=4, train=kind, lora_rank=2)
    student = wrap_model(drop_layers(tiny_model(Tiny("llama", 0)), plan))
    ids = torch.randint(3, 300, (10, 16), generator=torch.Generator().manual_seed(3))
    text = TrainingSequences(ids, ids.clone(), "random", torch.zeros(len(ids)), "random")
    teacher = OnlineTeacher(wrap_model(tiny_model(Tiny("llama", 0))))
    ready = make_trainable(student, recipe, plan)
    return train(ready, teacher, text, range(8, 10), recipe, 6, Run(folder, batch_size=batch_size))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_training_is_the_same_with_every_batch(kind: str, tmp_path: Path) -> None:
    curves = [
        [line["loss"] for line in trained(tmp_path / str(size), size, kind).log if "loss" in line] for size in (1, 4)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert len(curves[0]) == 6
