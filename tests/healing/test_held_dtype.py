"""A student whose float32 weights would not fit: what is frozen is held as it is stored, and the numbers stay the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import TEXT
from tiny_models import Tiny, load_plain, save_tiny, tiny_model

from sglp_llm import heal, prune
from sglp_llm.healing import planning
from sglp_llm.healing.opening import open_models
from sglp_llm.healing.planning import footprint, with_weights_that_fit
from sglp_llm.healing.trained import make_trainable
from sglp_llm.memory import FreeMemory
from sglp_llm.memory.peaks import USABLE
from sglp_llm.models import find_source
from sglp_llm.models.loading import load_model
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.processes import ALONE

RECIPE = HealingRecipe(dtype="bfloat16", seq_len=16, lora_rank=2, data=str(TEXT), sequences=2)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    original = save_tiny(tiny_model(Tiny("llama", 0)).to(torch.bfloat16), folder / "original")
    settings = {"criterion": "random", "samples": 2, "seq_len": 16, "compensate": "none", "heal": False}
    prune(original, folder / "short", drop=2, calibration=str(TEXT), **settings)
    return folder / "short"


@pytest.mark.parametrize("train", ["lora", "seam", "full"])
def test_gradients_are_those_of_a_float32_student(train: str, short: Path) -> None:
    found = []
    for dtype in ("float32", "auto"):
        decoder = load_model(find_source(short), dtype)
        models = open_models(short, short.parent / "out", RECIPE, None, ALONE)
        trained = make_trainable(decoder, RECIPE.with_changes(train=train, seam_layers=1), models.plan)
        with torch.autocast("cpu", torch.bfloat16):
            logits = trained.model(input_ids=torch.arange(3, 19)[None]).logits
        logits.float().square().mean().backward()
        found.append([logits, *(each.grad for each in trained.model.parameters() if each.requires_grad)])
        narrow = {each.dtype for each in trained.model.parameters() if not each.requires_grad}
        assert narrow <= {torch.float32, *([torch.bfloat16] if dtype == "auto" else [])}
        assert (torch.bfloat16 in narrow) == (dtype == "auto" and train != "full")
    assert len(found[0]) > 1
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_heal_where_the_float32_student_does_not_fit(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = open_models(short, tmp_path / "out", RECIPE, None, ALONE)
    assert with_weights_that_fit(models, RECIPE, ALONE) is models
    numbers = models.student.load().num_parameters
    least = int((footprint(models, RECIPE, 0).sequence + 4 * numbers) / USABLE)
    models.student.release()
    for free, dtype in ((least + 10, torch.float32), (least - 10, torch.bfloat16)):
        monkeypatch.setattr(planning, "free_memory", lambda free=free: FreeMemory(free))
        assert with_weights_that_fit(models, RECIPE, ALONE).dtype == dtype
    assert with_weights_that_fit(models, RECIPE.with_changes(dtype="float32"), ALONE) is models
    settings = {"train": "lora", "tokens": 256, "learning_rate": 0.02, "held_out": 0.2, "store": None}
    streamed, stream = list[str](), OpenedModel.stream

    def seen(self: OpenedModel, scratch: str | None = None) -> None:
        streamed.append(self.identity.name)
        stream(self, scratch)

    monkeypatch.setattr(OpenedModel, "stream", seen)
    monkeypatch.setattr(planning, "free_memory", lambda: FreeMemory(1))
    report = heal(short, tmp_path / "out", recipe=RECIPE.with_changes(**settings))
    assert streamed == [str(short.parent / "original")]  # it fitted alone, and does not beside the student
    assert report.verification is not None
    assert report.verification["dtype"] == "bfloat16"
    assert load_plain(tmp_path / "out").dtype == torch.bfloat16
    changed = [
        name
        for (name, one), other in zip(
            load_plain(tmp_path / "out").named_parameters(), load_plain(short).parameters(), strict=True
        )
        if not torch.equal(one, other)
    ]
    assert changed
    assert all("proj" in name for name in changed)
