"""What does not fit is said in one line, and where the engine was left open the analysis goes on with the other one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from checkpoints import QUICK, run_cli
from placements import calibration, llama
from pretended_devices import PretendedDevices
from tiny_models import save_tiny
from transformers.models.llama.modeling_llama import LlamaMLP

from sglp_llm import analyze
from sglp_llm.analysis.observing import observe
from sglp_llm.errors import UserError
from sglp_llm.models.loading import wrap_model
from sglp_llm.plan import Recipe
from sglp_llm.processes.distributed import local_device

EVERYTHING_ON_0: dict[str, int | str] = dict.fromkeys(
    [
        "model.embed_tokens",
        "model.rotary_emb",
        "model.norm",
        "lm_head",
        *(f"model.layers.{index}" for index in range(5)),
    ],
    0,
)


@pytest.mark.parametrize(
    ("offloaded", "criterion", "said"),
    [
        ("model.embed_tokens", "bi", "its input embeddings were offloaded"),
        ("model.layers.3", "magnitude", "decoder layer 3 was offloaded"),
        ("model.layers.3", "gradnorm", "a part of it was offloaded"),
    ],
)
def test_what_accelerate_has_offloaded(offloaded: str, criterion: str, said: str) -> None:
    devices = PretendedDevices(1)
    with devices.pretended():
        model = wrap_model(dispatch_model(llama(), EVERYTHING_ON_0 | {offloaded: "cpu"}))
    with devices.pretended(), pytest.raises(UserError, match=said):
        observe(model, calibration(), Recipe(criterion=criterion, batch_size=2), [criterion], similarity=False)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with PretendedDevices(2).pretended():
        assert local_device() == 1
    with (
        PretendedDevices(1).pretended(),
        pytest.raises(UserError, match="2 processes on this host and 1 GPU: start at most"),
    ):
        local_device()


def out_of_memory(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Makes a part of transformers run out of memory so many times; the list counts."""
    forward, seen = LlamaMLP.forward, [0]

    def failing(self: LlamaMLP, *args: Any) -> torch.Tensor:
        seen[0] += 1
        if seen[0] <= times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        result: torch.Tensor = forward(self, *args)
        return result

    monkeypatch.setattr(LlamaMLP, "forward", failing)
    return seen


def test_an_open_engine_becomes_the_streamed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, settings = save_tiny(llama(), tmp_path), {"criterion": "gradnorm", "drop": 1}
    expected = analyze(source, calibration=calibration(), engine="streamed", **settings).plan
    seen = out_of_memory(monkeypatch, 1)
    found = analyze(source, calibration=calibration(), engine="auto", **settings).plan
    assert seen[0] > 1
    assert found.kept == expected.kept
    assert found.scores["gradnorm"] == pytest.approx(expected.scores["gradnorm"], rel=1e-5)


def test_one_line_says_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(llama(), tmp_path / "source")
    out_of_memory(monkeypatch, 10**6)
    outcome = run_cli(
        "prune", str(source), "--drop", "1", "--output", str(tmp_path / "out"), *QUICK, "--engine", "resident"
    )
    assert outcome.code == 1
    assert "the device is out of memory: --engine streamed" in outcome.error
    assert not (tmp_path / "out").exists()
