"""Shortened GGUF files in llama.cpp itself: its logits and greedy tokens against transformers on the same plan's model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import logits_of, run_cli
from gguf import GGMLQuantizationType
from gguf_files import gguf_model, write_gguf
from helpers import ROOT
from transformers import AutoModelForCausalLM

from sglp_llm import prune
from sglp_llm.calibration import CalibrationSet
from sglp_llm.plan import plan_from_indices

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed (pip install llama-cpp-python)")

TOKENS = list(range(3, 15))  # those of `logits_of`
REMOVED = (1, 4)


def in_llama_cpp(file: Path, tokens: list[int], new: int = 0) -> tuple[torch.Tensor, list[int]]:
    """Logits ``[tokens, vocabulary]`` of llama.cpp, and its greedy continuation."""
    options: dict[str, Any] = {"type_k": 0, "type_v": 0, "flash_attn": False}  # a cache in float32
    model = llama_cpp.Llama(
        str(file), n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, **options
    )
    model.eval(tokens)
    logits = torch.tensor(model.scores[: len(tokens)].copy())
    continued = list(tokens)
    for _ in range(new):
        continued.append(int(model.scores[len(continued) - 1].argmax()))
        model.eval(continued[-1:])
    model.close()
    return logits, continued[len(tokens) :]


def pruned(source: Path, removed: tuple[int, ...]) -> Path:
    output = source.with_name("out.gguf")
    ids = CalibrationSet(torch.tensor([TOKENS]), torch.ones(1, len(TOKENS), dtype=torch.bool), "ids", 0, "", False)
    prune(source, output, plan=plan_from_indices(6, removed), calibration=ids)
    return output


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_families(model_type: str, tmp_path: Path) -> None:
    # Windows of 4 tokens, so that which layers have one shows in the logits; the plan leaves an irregular pattern.
    changes = {"num_hidden_layers": 6, "sliding_window": 4} if "gemma" in model_type else {}
    output = pruned(write_gguf(tmp_path / "tiny.gguf", model_type, **changes), REMOVED)
    found, _ = in_llama_cpp(output, TOKENS)
    expected = logits_of(gguf_model(model_type, **changes), skip=REMOVED)[0]
    # llama.cpp stores no activation in half precision here, but Gemma's GELU comes from a table of 2**16 values.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_an_array_with_an_entry_a_layer(tmp_path: Path) -> None:
    """llama.cpp loads no array but of ``block_count`` entries, and its own --prune-layers leaves them uncut."""
    source = write_gguf(tmp_path / "tiny.gguf", extra={"expert_used_count": [0] * 6})
    output = pruned(source, REMOVED)
    found, _ = in_llama_cpp(output, TOKENS)
    expected = logits_of(gguf_model(), skip=REMOVED)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("quantised", ["Q8_0", "Q4_0"])
def test_quantised(quantised: str, tmp_path: Path) -> None:
    output = pruned(write_gguf(tmp_path / "tiny.gguf", quantised=GGMLQuantizationType[quantised]), REMOVED)
    found, _ = in_llama_cpp(output, TOKENS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    expected = logits_of(model)[0]
    # llama.cpp rounds the activations to 8 bits before it multiplies quantised matrices.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    tool = [sys.executable, ROOT / "tools" / "fetch_smollm2.py"]
    source = Path(subprocess.run(tool, check=True, capture_output=True, text=True).stdout.strip())
    for output in ("out.gguf", "folder"):
        outcome = run_cli("prune", source, "--plan", "13,14,15", "-o", tmp_path / output, "--no-verify")
        assert outcome.code == 0, outcome
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    prompt = [504, 3575, 282, 4649, 314]  # "The capital of France is"
    found, continued = in_llama_cpp(tmp_path / "out.gguf", prompt, new=1)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0]
    assert found.argmax(-1).equal(expected.argmax(-1))
    assert continued == expected[-1:].argmax(-1).tolist()
    # As of the whole model, but for the one token with massive activations, of which 8 bits leave little.
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    assert float(cosine.min()) > 0.97
    assert float(cosine.median()) > 0.995
