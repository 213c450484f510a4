"""What only a GPU can show. Oracle: the same on the CPU, plain autograd, and torch's own count of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_sets import plain_set, sampled_set
from helpers import ROOT, TEXT
from placements import LAYERS, llama, spread
from rehearsed_steps import STEPS, assert_same, values
from tiny_models import load_plain, random_model, save_tiny
from transformers import AutoConfig

from sglp_llm import prune
from sglp_llm.compensation import FitSettings, get_method
from sglp_llm.criteria import make_criterion
from sglp_llm.engine import Batch, Need, Observer, PassSettings, run_pass
from sglp_llm.engine.norms.ghost import Norms
from sglp_llm.evaluation.benchmark import greedy
from sglp_llm.memory.prediction import predict_memory
from sglp_llm.models import find_source
from sglp_llm.models.loading import DecoderModel, load_model, load_streamed, wrap_model
from sglp_llm.plan import Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(llama(), tmp_path_factory.mktemp("model"))


def on_gpu(dtype: torch.dtype = torch.float32) -> DecoderModel:
    return wrap_model(llama().to("cuda", dtype))


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize(("kind", "name"), STEPS, ids=[name for _, name in STEPS])
def test_values_are_those_of_the_cpu(kind: str, name: str, streamed: bool, folder: Path) -> None:
    model = load_streamed(find_source(folder)) if streamed else on_gpu()
    assert_same(values(model, kind, name), values(wrap_model(llama()), kind, name), 2e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
@pytest.mark.parametrize(("kind", "name"), STEPS, ids=[name for _, name in STEPS])
def test_two_gpus_by_a_device_map(kind: str, name: str) -> None:
    assert_same(values(wrap_model(spread(llama())), kind, name), values(wrap_model(llama()), kind, name), 2e-3)


class Squares(Observer):
    needs = Need.GRADIENT_NORMS

    def __init__(self) -> None:
        self.sums: dict[tuple[int, int], torch.Tensor] = {}

    def on_gradient_norm(self, layer: int, batch: Batch, name: str, squared: torch.Tensor) -> None:
        key = batch.first, layer
        self.sums[key] = self.sums[key] + squared if key in self.sums else squared


def squares(model: DecoderModel, norms: Norms, batch_size: int) -> torch.Tensor:
    """``[layers, sequences]``."""
    seen = Squares()
    run_pass(model, plain_set(4), [seen], PassSettings(batch_size, norms=norms))
    firsts = sorted({first for first, _ in seen.sums})
    return torch.stack(
        [torch.cat([seen.sums[first, layer] for first in firsts]) for layer in range(model.num_layers)]
    ).cpu()


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("norms", ["ghost", "direct"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_norms_are_those_of_autograd(dtype: torch.dtype, error: float, norms: Norms, batch_size: int) -> None:
    expected = squares(on_gpu(dtype), "autograd", 1)
    torch.testing.assert_close(squares(on_gpu(dtype), norms, batch_size), expected, rtol=error, atol=0)


@pytest.mark.parametrize("name", ["linear", "learned"])
def test_a_compensation_lowers_the_held_out_divergence(name: str) -> None:
    model = on_gpu()
    calibration = sampled_set(model.model.cpu(), 24)
    model.model.cuda()
    report = get_method(name).run(model, calibration, (2,), FitSettings(batch_size=8)).report
    found = report["refined"]["divergences"] if name == "learned" else report["losses"]
    assert found["held_out"]["with"] < found["held_out"]["without"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_prune_writes_a_checkpoint_that_reloads(dtype: str, engine: str, tmp_path: Path) -> None:
    source = save_tiny(llama().to(getattr(torch, dtype)), tmp_path / "source")
    settings: dict[str, Any] = {"criterion": "gradnorm", "compensate": "linear", "samples": 8, "seq_len": 16}
    report = prune(source, tmp_path / "out", drop=1, calibration=TEXT, dtype=dtype, engine=engine, **settings)
    assert len(report.plan.kept) == LAYERS - 1
    assert load_plain(tmp_path / "out").dtype == getattr(torch, dtype)


@pytest.mark.parametrize("criterion", ["gradnorm", "taylor", "bi"])
@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_no_more_memory_is_taken_than_predicted(criterion: str, engine: str, tmp_path: Path) -> None:
    shape = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
    config = AutoConfig.for_model("llama", num_hidden_layers=8, **shape)
    save_tiny(random_model("llama", num_hidden_layers=8, **shape), tmp_path)
    recipe = Recipe(criterion=criterion, samples=4, seq_len=512, batch_size=4, dtype="bfloat16", segments=None)
    predicted = getattr(predict_memory(config, recipe), engine).device_peak
    load = load_model if engine == "resident" else load_streamed
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load(find_source(tmp_path), "bfloat16")
    run_pass(model, plain_set(4, 512), [make_criterion(criterion, 8)], PassSettings(4))
    assert torch.cuda.max_memory_allocated() - before <= predicted


def test_generation_is_that_of_the_cpu() -> None:
    prompt = plain_set(2).input_ids
    assert torch.equal(greedy(on_gpu(), prompt.cuda(), 8).tokens.cpu(), greedy(wrap_model(llama()), prompt, 8).tokens)


@TWO
@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_two_processes_choose_what_one_does(engine: str, tmp_path: Path) -> None:
    source = save_tiny(llama(), tmp_path / "source")
    plans = []
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc-per-node", "2"]):
        output = tmp_path / str(len(launcher))
        command = [sys.executable, *launcher, "-m", "sglp_llm", "prune", str(source), "--drop", "2", "--output", output]
        command += ["--criterion", "gradnorm", "--calibration", TEXT, "--samples", "8", "--seq-len", "16"]
        subprocess.run([*command, "--engine", engine], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        plans.append(load_plain(output))
    for one, other in zip(plans[0].parameters(), plans[1].parameters(), strict=True):
        assert torch.equal(one, other)
