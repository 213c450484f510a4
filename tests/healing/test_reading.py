"""Which sequences are held out: the last ones of every text, and none that the removal was fitted on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tiny, save_tiny, tiny_model

from sglp_llm import drop_layers
from sglp_llm.calibration import calibration_set
from sglp_llm.healing.opening import HealingModels
from sglp_llm.healing.reading import read_text
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import plan_from_indices
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.progress import silent

LENGTH = 16
PLAN = plan_from_indices(6, (2, 3))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    model = drop_layers(tiny_model(Tiny("llama", 0)), PLAN)
    return OpenedModel(save_tiny(model, tmp_path_factory.mktemp("student") / "tiny"), None, "float32", None, None)


def text(file: Path, first: int, count: int) -> str:
    file.write_text(" ".join(f"number {first + n} of all" for n in range(count)))
    return f"text:{file}"


def rows(ids: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in ids.tolist()]


def read(student: OpenedModel, data: str, settings: dict[str, Any] | None = None, **changes: Any) -> tuple[list, list]:
    """Sequences that are trained on, and those that are held out."""
    plan = None if settings is None else replace(PLAN, settings=settings)
    recipe = HealingRecipe(data=data, seq_len=LENGTH, sequences=2, held_out=0.2).with_changes(**changes)
    sequences, held_out, steps = read_text(HealingModels(student, plan, None), recipe, None, silent)
    every = rows(sequences.input_ids)
    assert held_out.stop == len(every)
    assert steps >= 1
    return every[: held_out.start], every[held_out.start :]


def windows(student: OpenedModel, data: str) -> list[tuple[int, ...]]:
    """The text in pieces of one sequence's length."""
    ids = student.tokenizer(Path(data.removeprefix("text:")).read_text(), add_special_tokens=False)["input_ids"]
    return [tuple(ids[first : first + LENGTH]) for first in range(0, len(ids) - LENGTH + 1, LENGTH)]


def test_the_last_sequences_are_held_out(student: OpenedModel, tmp_path: Path) -> None:
    data = text(tmp_path / "a", 0, 200)
    trained, held_out = read(student, data, tokens=20 * LENGTH)
    assert sorted(trained) == sorted(windows(student, data)[:20])
    assert sorted(held_out) == sorted(windows(student, data)[20:24])


def test_of_several_texts_the_last_ones_of_each(student: OpenedModel, tmp_path: Path) -> None:
    parts = [text(tmp_path / name, first, 200) for name, first in (("a", 0), ("b", 1000))]
    trained, held_out = read(student, " ".join(parts), tokens=20 * LENGTH)
    assert sorted(trained) == sorted(window for part in parts for window in windows(student, part)[:10])
    assert sorted(held_out) == sorted(window for part in parts for window in windows(student, part)[10:12])


def test_text_that_the_removal_was_fitted_on_does_not_judge(student: OpenedModel, tmp_path: Path) -> None:
    data = text(tmp_path / "a", 0, 600)
    fitted = {"calibration": data, "samples": 30, "seq_len": 24, "seed": 3, "compensate": "linear"}
    seen = calibration_set(student.tokenizer, data, samples=30, seq_len=24, seed=3).input_ids
    known = {tuple(row[first : first + 16]) for row in seen.tolist() for first in range(24 - 16 + 1)}
    trained, held_out = read(student, data, fitted, tokens=20 * LENGTH)
    assert (len(trained), len(held_out)) == (20, 4)
    assert not known & set(held_out)
    assert not set(trained) & set(held_out)
    plain = read(student, data, tokens=20 * LENGTH)
    for changes in ({"compensate": "none"}, {"calibration": "other"}, {"samples": "30"}):
        assert read(student, data, {**fitted, **changes}, tokens=20 * LENGTH) == plain


def test_where_there_is_no_other_text_it_does(student: OpenedModel, tmp_path: Path) -> None:
    data = text(tmp_path / "a", 0, 40)
    most = len(windows(student, data))
    fitted = {"calibration": data, "samples": most, "seq_len": LENGTH, "seed": 0, "compensate": "linear"}
    trained, held_out = read(student, data, fitted, epochs=1)
    assert sorted(trained + held_out) == sorted(windows(student, data))
    assert sorted(held_out) == sorted(windows(student, data)[-len(held_out) :])
