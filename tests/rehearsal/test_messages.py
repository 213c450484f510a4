"""What does not fit is said in one line, and where the engine was left open the analysis goes on with the other one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from checkpoints import QUICK, run_cli
from placements import LAYERS, calibration, llama
from pretended_devices import PretendedDevices
from tiny_models import save_tiny
from transformers.models.llama.modeling_llama import LlamaMLP

from sglp_llm import analyze
from sglp_llm.analysis.observing import observe
from sglp_llm.compensation.repair import cuts, refine
from sglp_llm.engine import resident
from sglp_llm.errors import UserError
from sglp_llm.models import opened
from sglp_llm.models.loading import wrap_model
from sglp_llm.plan import Recipe
from sglp_llm.processes.distributed import local_device
from sglp_llm.records import PrunePlan
from sglp_llm.trials import measures

EVERYTHING_ON_0: dict[str, int | str] = dict.fromkeys(
    [
        "model.embed_tokens",
        "model.rotary_emb",
        "model.norm",
        "lm_head",
        *(f"model.layers.{index}" for index in range(LAYERS)),
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


def out_of_memory(
    monkeypatch: pytest.MonkeyPatch, times: int, part: Any = LlamaMLP, name: str = "forward"
) -> list[int]:
    """Makes a function run out of memory so many times; the list counts."""
    function, seen = getattr(part, name), [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] <= times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return function(*args, **kwargs)

    monkeypatch.setattr(part, name, failing)
    return seen


PHASES: dict[str, tuple[Any, str]] = {
    "loading": (opened, "load_model"),
    "a pass": (LlamaMLP, "forward"),
    "a loss": (resident, "sequence_loss"),
    "a trial": (measures, "sequence_loss"),
    "a repair": (cuts, "layer_in_memory"),
    "a refinement": (refine, "divergence_gradient"),
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PrunePlan]:
    """The plan that an engine finds."""
    source = save_tiny(llama(), tmp_path_factory.mktemp("model"))
    settings: dict[str, Any] = {"criterion": "gradnorm", "also": ("ppl",), "drop": 1, "protect": {"first": 1}}
    settings |= {"compensate": "learned", "calibration": calibration(3), "batch_size": 2, "trial_samples": 1}
    return lambda engine: analyze(source, engine=engine, **settings).plan


@pytest.fixture(scope="module")
def expected(planned: Callable[[str], PrunePlan]) -> PrunePlan:
    return planned("streamed")


@pytest.mark.parametrize("phase", PHASES)
def test_an_open_engine_becomes_the_streamed_one(
    phase: str, planned: Callable[[str], PrunePlan], expected: PrunePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, name = PHASES[phase]
    seen = out_of_memory(monkeypatch, 1, part, name)
    found = planned("auto")
    assert seen[0] >= 1
    assert found.kept == expected.kept
    for name, scores in expected.scores.items():
        assert found.scores[name] == pytest.approx(scores, rel=1e-5)


def test_one_line_says_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(llama(), tmp_path / "source")
    out_of_memory(monkeypatch, 10**6)
    outcome = run_cli(
        "prune", str(source), "--drop", "1", "--output", str(tmp_path / "out"), *QUICK, "--engine", "resident"
    )
    assert outcome.code == 1
    assert "the device is out of memory: --engine streamed" in outcome.error
    assert not (tmp_path / "out").exists()
