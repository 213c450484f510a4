"""From a recipe to what it takes in memory, and to the engine that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import QUICK, run_cli, save_tiny
from tiny_models import every_tiny, tiny_model
from transformers import AutoConfig

from sglp_llm.engine import Need
from sglp_llm.memory import EngineMemory, FreeMemory, MemoryPlan
from sglp_llm.memory.peaks import choose_engine, fits
from sglp_llm.memory.prediction import chosen_engine, forecast, predict_memory, work_of
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import Recipe


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


def llama(**changes: Any) -> Any:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    return AutoConfig.for_model("llama", **{**shape, "vocab_size": 256, **changes})


def test_what_a_recipe_does() -> None:
    assert work_of(Recipe()).needs == Need.HIDDEN_STATES | Need.GRADIENT_NORMS
    assert work_of(Recipe(criterion="magnitude")).needs == Need.WEIGHTS
    assert work_of(Recipe(criterion="search")).needs == Need.HIDDEN_STATES | Need.TRIALS
    work = work_of(Recipe(criterion="bi", also=("taylor", "kl"), samples=4, trial_samples=9, scratch="x"))
    assert work.needs == Need.HIDDEN_STATES | Need.GRADIENTS | Need.TRIALS
    assert (work.trial_samples, work.batch_size, work.scratch, work.sums_on_host) == (4, 4, True, False)
    assert work_of(Recipe(criterion="taylor", options={"taylor": {"accumulator": "host"}})).sums_on_host
    assert (
        predict_memory(llama(), Recipe(dtype="bfloat16")).resident.host["weights"] * 2
        == (predict_memory(llama(), Recipe(dtype="float32")).resident.host["weights"])
    )


def engines(resident: int, streamed: int, device: int | None = None) -> MemoryPlan:
    on_device = None if device is None else {"weights": device}
    return MemoryPlan(
        EngineMemory("resident", {"weights": resident}, on_device, 0),
        EngineMemory("streamed", {"weights": streamed}, None, 50),
    )


@pytest.mark.parametrize(
    ("plan", "free", "chosen"),
    [
        (engines(90, 10), FreeMemory(100), "resident"),
        (engines(91, 10), FreeMemory(100), "streamed"),
        (engines(91, 92), FreeMemory(100), "streamed"),
        (engines(91, 10), FreeMemory(None), "resident"),
        (engines(10, 10, 91), FreeMemory(1000, 100), "streamed"),
        (engines(10, 10, 90), FreeMemory(1000, 100), "resident"),
    ],
)
def test_resident_where_it_fits(plan: MemoryPlan, free: FreeMemory, chosen: str) -> None:
    assert choose_engine(plan, free) == chosen


def test_a_full_disk_does_not_fit() -> None:
    assert fits(engines(1, 1).streamed, FreeMemory(100, disk=56))
    assert not fits(engines(1, 1).streamed, FreeMemory(100, disk=55))


def test_the_engine_of_a_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, live = OpenedModel(tiny), OpenedModel(tiny_model(every_tiny()[0]))
    assert chosen_engine(opened, Recipe(engine="streamed")) == "streamed"
    assert chosen_engine(opened, Recipe(engine="resident")) == "resident"
    assert chosen_engine(opened, Recipe()) == "resident"
    monkeypatch.setattr("sglp_llm.memory.prediction.free_memory", lambda *_: FreeMemory(1))
    assert chosen_engine(opened, Recipe()) == "streamed"
    assert forecast(opened, Recipe()) == (predict_memory(opened.config, Recipe()).streamed, FreeMemory(1))
    assert chosen_engine(opened, Recipe(device_map="auto")) == "resident"
    assert chosen_engine(live, Recipe()) == "resident"


def test_engines_do_not_tell_in_the_plan(tiny: Path) -> None:
    plan = json.loads(run_cli("analyze", tiny, *QUICK, "--engine", "resident", "--json").out)["plan"]
    assert not {"engine", "scratch"} & set(plan["settings"])
