"""How much of what waits between layers stays on a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from placements import calibration, llama
from pretended_devices import PretendedDevices
from tiny_models import save_tiny

from sglp_llm.analysis import opening
from sglp_llm.criteria import make_criterion
from sglp_llm.engine import Batch, PassSettings, run_pass
from sglp_llm.engine.states import DEVICE_SHARE, StateStore, state_store
from sglp_llm.memory import FreeMemory
from sglp_llm.memory.peaks import plan_memory
from sglp_llm.memory.prediction import work_of
from sglp_llm.models.loading import wrap_model
from sglp_llm.plan import Recipe

BATCHES = [Batch(index, 1, None) for index in range(3)]


def test_states_stay_on_the_device_up_to_a_limit() -> None:
    devices = PretendedDevices()
    with devices.pretended():
        model = wrap_model(llama().to("cuda"))
        states = [torch.full((1, 4, 8), float(index), device="cuda") for index in range(3)]
        with state_store(replace(model, state_bytes=2 * states[0].nbytes)) as store:
            for batch, each in zip(BATCHES, states, strict=True):
                store.put("a", batch, each)
            store.share("a", "b")
            assert [kept(store, "a", batch) for batch in BATCHES] == ["cuda", "cuda", "cpu"]
            for batch, each in zip(BATCHES, states, strict=True):
                assert store.get("b", batch).device == each.device
                assert torch.equal(store.get("b", batch), each)
            store.drop("a")  # "b" still has them
            store.put("c", BATCHES[0], states[0] + 1)
            assert kept(store, "c", BATCHES[0]) == "cpu"
            store.drop("b")
            store.put("c", BATCHES[0], states[0] + 2)
            assert kept(store, "c", BATCHES[0]) == "cuda"
        devices.free = int(2 * states[0].nbytes / DEVICE_SHARE)
        with state_store(model) as store:  # nothing was predicted
            for batch, each in zip(BATCHES, states, strict=True):
                store.put("a", batch, each)
            assert [kept(store, "a", batch) for batch in BATCHES] == ["cuda", "cuda", "cpu"]


def kept(store: StateStore, slot: str, batch: Batch) -> str:
    return store._kept[slot][batch.first].device.type


@pytest.mark.parametrize("free", [10**9, 10**6])
def test_no_more_stay_than_was_predicted(free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run with streamed layers; with little free only some of them stay, and all fit."""
    source, recipe = (
        save_tiny(llama(), tmp_path),
        Recipe(engine="streamed", batch_size=2, samples=4, seq_len=16, drop=1),
    )
    devices, there, most = PretendedDevices(), FreeMemory(None, free), 0
    devices.free = free
    # Not while devices are pretended: the prediction has tensors of its own that only claim to be there.
    predicted = plan_memory(llama().config, torch.float32, work_of(recipe), True, there).streamed
    monkeypatch.setattr(opening, "forecast", lambda *_: (predicted, there))
    placed = StateStore._placed

    def seen(self: StateStore, states: torch.Tensor) -> torch.Tensor:
        nonlocal most
        result = placed(self, states)
        here = [each for slot in self._kept.values() for each in slot.values() if each.is_cuda]
        most = max(most, sum({id(each): each.nbytes for each in [*here, *([result] * result.is_cuda)]}.values()))
        return result

    monkeypatch.setattr(StateStore, "_placed", seen)
    with devices.pretended():
        shown = list[Any]()
        opened = opening.open_for_analysis(
            source, recipe, calibration=calibration(), on_forecast=lambda *forecast: shown.append(forecast)
        )
        assert shown == [(predicted, there)]
        model = opened.model.load()
        run_pass(model, calibration(), [make_criterion("gradnorm", model.num_layers)], PassSettings(2))
    assert 0 < most <= predicted.state_bytes
