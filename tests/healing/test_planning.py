"""What is trained by the memory that there is, and the batch when memory runs out after all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import Tiny, save_tiny, tiny_model

from sglp_llm import drop_layers
from sglp_llm.errors import UserError
from sglp_llm.healing import planning
from sglp_llm.healing.opening import HealingModels
from sglp_llm.healing.planning import batch_that_runs, footprint
from sglp_llm.healing.preparing import check_batch, sequences_of
from sglp_llm.healing.trained import count_trained
from sglp_llm.memory import FreeMemory
from sglp_llm.memory.peaks import USABLE
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import plan_from_indices
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.processes import Processes


def attempts(fits: int, error: Exception) -> tuple[list[int], object]:
    tried: list[int] = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > fits:
            raise error

    return tried, attempt


class Many(Processes):
    def __init__(self, count: int) -> None:
        self.count = count


@pytest.mark.parametrize(("sequences", "count", "expected"), [(4, 1, 4), (4, 2, 4), (2, 8, 8), (1, 3, 3)])
def test_a_step_has_a_sequence_for_every_process(sequences: int, count: int, expected: int) -> None:
    recipe = HealingRecipe(sequences=sequences)
    check_batch(recipe, Many(count))
    assert sequences_of(recipe, Many(count)) == expected


def test_a_step_is_divided_evenly() -> None:
    with pytest.raises(UserError, match="the 4 of a step are not a multiple of 3 processes x batch_size 1"):
        check_batch(HealingRecipe(sequences=4), Many(3))


@pytest.mark.parametrize(("fits", "expected"), [(12, 12), (7, 6), (5, 4), (1, 1)])
def test_it_is_the_largest_divisor_that_runs(fits: int, expected: int) -> None:
    tried, attempt = attempts(fits, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    assert batch_that_runs(attempt, 12) == expected
    assert tried == [size for size in (12, 6, 4, 3, 2, 1) if size >= expected]


def test_one_sequence_is_too_much() -> None:
    with pytest.raises(UserError, match="out of memory with one sequence at a time: give --gradient-checkpointing"):
        batch_that_runs(attempts(0, torch.OutOfMemoryError("CUDA out of memory."))[1], 4)


def test_other_errors_are_not_about_memory() -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"):
        batch_that_runs(attempts(1, RuntimeError("shape mismatch"))[1], 4)


def models_of(folder: Path, removed: tuple[int, ...] | None) -> HealingModels:
    original = save_tiny(tiny_model(Tiny("llama", 0)), folder / "tiny")
    plan = plan_from_indices(6, (2, 3) if removed is None else removed)
    model = drop_layers(tiny_model(Tiny("llama", 0)), plan)
    student = save_tiny(model, folder / "student")
    opened = [OpenedModel(each, None, "float32", None, None) for each in (student, original)]
    return HealingModels(opened[0], None if removed is None else plan, opened[1])


def memory(free: int | None) -> Callable[[], FreeMemory]:
    return lambda: FreeMemory(host=free, device=None, disk=None)


@pytest.mark.parametrize("removed", [None, (2, 3)])
def test_what_is_trained_is_the_first_that_fits(
    removed: tuple[int, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = models_of(tmp_path, removed)
    recipe = HealingRecipe(seq_len=16, lora_rank=2, seam_layers=1)
    needs = {}
    for train in ("full", "seam", "lora"):
        if train == "seam" and removed is None:
            continue
        each = recipe.with_changes(train=train)
        predicted = footprint(models, each, count_trained(models.student.load(), each, models.plan))
        needs[train] = (predicted.trained + predicted.sequence) / USABLE
    assert list(needs.values()) == sorted(needs.values(), reverse=True)
    for train, least in needs.items():
        monkeypatch.setattr(planning, "free_memory", memory(int(least) + 1))
        assert planning.fitting_train(models, recipe) == train
    monkeypatch.setattr(planning, "free_memory", memory(None))
    assert planning.fitting_train(models, recipe) == "full"
    monkeypatch.setattr(planning, "free_memory", memory(1))
    assert planning.fitting_train(models, recipe) == "lora"
    monkeypatch.setattr(planning, "find_spec", lambda _: None)
    assert planning.fitting_train(models, recipe) == ("full" if removed is None else "seam")
