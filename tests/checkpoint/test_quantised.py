"""Checkpoints with quantised weights: a plan copies their tensors as they are, and their settings follow the layers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_sets import plain_set
from checkpoints import SMALL, run_cli, save_tiny
from helpers import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sglp_llm import analyze, prune
from sglp_llm.adapters import get_adapter
from sglp_llm.checkpoint.quantised import renumbered_modules
from sglp_llm.errors import UserError
from sglp_llm.plan import plan_from_indices

sys.path.append(str(ROOT / "tools"))
from tiny_types import tiny_config

Tensors = dict[str, torch.Tensor]
REMOVED = (1, 4)
NEW = {0: 0, 2: 1, 3: 2, 5: 3}


def gptq(weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    return {
        "qweight": torch.randint(-(2**31), 2**31 - 1, (columns // 8, rows), dtype=torch.int32),
        "qzeros": torch.randint(-(2**31), 2**31 - 1, (1, rows // 8), dtype=torch.int32),
        "scales": torch.randn(1, rows, dtype=torch.float16),
        "g_idx": torch.arange(columns, dtype=torch.int32),
    }


def fp8(weight: torch.Tensor) -> Tensors:
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": torch.rand(1, 1)}


def compressed(weight: torch.Tensor) -> Tensors:
    return {
        "weight_packed": torch.randint(-(2**31), 2**31 - 1, (weight.shape[0], weight.shape[1] // 8), dtype=torch.int32),
        "weight_scale": torch.randn(weight.shape[0], 1).bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }


def nf4(weight: torch.Tensor) -> Tensors:
    """As bitsandbytes stores 4-bit weights with doubly quantised scales."""
    blocks = weight.numel() // 64
    state = {"blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape), "quant_type": "nf4"}
    return {
        "weight": torch.randint(0, 256, (weight.numel() // 2, 1), dtype=torch.uint8),
        "weight.absmax": torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        "weight.quant_map": torch.randn(16),
        "weight.nested_absmax": torch.rand(1),
        "weight.nested_quant_map": torch.randn(256),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def mxfp4(weight: torch.Tensor) -> Tensors:
    """As gpt-oss stores its experts: 32 numbers of 4 bits share a scale."""
    experts, inputs, outputs = weight.shape
    return {
        "_blocks": torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8),
        "_scales": torch.randint(0, 256, (experts, outputs, inputs // 32), dtype=torch.uint8),
    }


NAMED = [
    "lm_head",
    "model.layers.0.mlp",
    "model.layers.1.mlp.down_proj",
    "model.layers.5.self_attn.q_proj",
    "model.layers.4",
]
RENAMED = ["lm_head", "model.layers.0.mlp", "model.layers.3.self_attn.q_proj"]
FORMATS: dict[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, Any], dict[str, Any]]] = {
    "gptq": (
        gptq,
        {"bits": 4, "group_size": -1, "dynamic": {"model.layers.2.mlp.up_proj": {"bits": 8}, "model.layers.1.mlp": {}}},
        {"bits": 4, "group_size": -1, "dynamic": {"model.layers.1.mlp.up_proj": {"bits": 8}}},
    ),
    "fp8": (
        fp8,
        {"weight_block_size": [128, 128], "modules_to_not_convert": NAMED},
        {"weight_block_size": [128, 128], "modules_to_not_convert": RENAMED},
    ),
    "compressed-tensors": (
        compressed,
        {"ignore": NAMED, "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}},
        {"ignore": RENAMED, "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}},
    ),
    "bitsandbytes": (
        nf4,
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": NAMED},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": RENAMED},
    ),
    "mxfp4": (
        mxfp4,
        {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", *NAMED]},
        {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", *RENAMED]},
    ),
}
QUANTISED = {"mxfp4": re.compile(r"layers\.\d+\.mlp\.experts\.\w+_proj$")}


def unquantised(folder: Path, method: str) -> Path:
    """The checkpoint before; the format of gpt-oss is its own."""
    if method != "mxfp4":
        return save_tiny(folder)
    settings = tiny_config("gpt_oss").to_dict() | {"num_hidden_layers": 6}
    settings["layer_types"] = settings["layer_types"][:6]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).bfloat16().save_pretrained(folder)
    return folder


def quantised(source: Path, method: str) -> Path:
    """Turns a tiny checkpoint into one with such weights, as the tools of the format write it."""
    torch.manual_seed(0)
    pack, settings, _ = FORMATS[method]
    tensors: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if QUANTISED.get(method, re.compile(r"layers\.\d+\..*_proj\.weight$")).search(name):
            tensors |= {name.removesuffix("weight") + key: each.contiguous() for key, each in pack(tensor).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **settings}
    (source / "config.json").write_text(json.dumps(config))
    return source


def moved(name: str) -> str | None:
    match = re.match(r"(model\.layers\.)(\d+)(\..*)", name)
    if match is None:
        return name
    return f"{match[1]}{NEW[int(match[2])]}{match[3]}" if int(match[2]) in NEW else None


@pytest.mark.parametrize("method", FORMATS)
def test_tensors_are_copied_and_settings_follow(method: str, tmp_path: Path) -> None:
    source = quantised(unquantised(tmp_path / "source", method), method)
    report = prune(source, tmp_path / "out", plan=plan_from_indices(6, REMOVED))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == {new for name in before if (new := moved(name))}
    for name, tensor in before.items():
        if new := moved(name):
            assert after[new].dtype == tensor.dtype
            assert after[new].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert config["quantization_config"] == {"quant_method": method, **FORMATS[method][2]}
    assert report.verification is None
    assert report.notes == (f"no reload check: {method.upper()} weights are copied as they are, and not run",)


def test_the_plan_of_the_unquantised_model_applies(tmp_path: Path) -> None:
    plan = analyze(
        save_tiny(tmp_path / "plain"), criterion="reverse", drop=2, calibration="pydoc", samples=2, seq_len=8
    ).plan
    source = quantised(save_tiny(tmp_path / "source"), "fp8")
    report = prune(source, tmp_path / "out", plan=plan)
    assert report.plan.removed == plan.removed
    assert f"the plan was made for {tmp_path / 'plain'}, which has other tensors or settings" in report.notes
    other = analyze(
        save_tiny(tmp_path / "opt", "opt"), criterion="reverse", drop=2, calibration="pydoc", samples=2, seq_len=8
    ).plan
    wider = quantised(save_tiny(tmp_path / "wide", intermediate_size=96), "fp8")
    for model, made in ((source, other), (wider, plan)):
        with pytest.raises(UserError, match="the plan was made for another model"):
            prune(model, tmp_path / "other", plan=made)
    assert not (tmp_path / "other").exists()


def test_the_plan_of_a_sibling_of_the_same_shape_applies(tmp_path: Path) -> None:
    settings = {"calibration": plain_set(8, 16), "drop": 2}
    plan = analyze(save_tiny(tmp_path / "plain"), criterion="reverse", **settings).plan
    tuned = save_tiny(tmp_path / "tuned", vocab_size=384, rms_norm_eps=1e-3)  # more tokens, other settings
    report = prune(tuned, tmp_path / "out", plan=plan)
    assert report.plan.removed == plan.removed
    assert f"the plan was made for {tmp_path / 'plain'}, which has other tensors or settings" in report.notes
    assert report.verification is not None
    name = "model.layers.0.mlp.down_proj.weight"
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    repaired = replace(plan, replaced={name: weights[name] + 1})
    with pytest.raises(UserError, match=r"replaces weights, fitted to those of .* --compensate none"):
        prune(tuned, tmp_path / "other", plan=repaired)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--criterion", "sglp"), "criterion sglp, which computes gradients, needs unquantised ones"),
        (("--criterion", "bi", "--compensate", "linear"), "compensate linear needs unquantised ones"),
        (("--criterion", "bi", "--heal"), "training needs unquantised ones"),
        (("--criterion", "bi"), "transformers cannot load the weights"),
    ],
)
def test_what_needs_other_weights_names_the_way_on(options: tuple[str, ...], what: str, tmp_path: Path) -> None:
    source = quantised(save_tiny(tmp_path / "source"), "gptq")
    outcome = run_cli("prune", source, "--drop", 2, *options, *SMALL, "--output", tmp_path / "out")
    assert outcome.code == 2
    assert what in outcome.error
    assert outcome.error.endswith("make the plan on the unquantised model, and give it here with --plan")
    assert not (tmp_path / "out").exists()


def test_patterns_with_an_index_are_refused() -> None:
    adapter = get_adapter("llama")
    assert renumbered_modules(["re:.*lm_head", "re:.*self_attn"], adapter, [0, 2], "m") == [
        "re:.*lm_head",
        "re:.*self_attn",
    ]
    with pytest.raises(UserError, match="cannot be renumbered"):
        renumbered_modules({"ignore": [r"re:model\.layers\.3\.mlp"]}, adapter, [0, 2], "m")
