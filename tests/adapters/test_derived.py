"""Model types without a file of their own, pruned and compared with plain transformers by `tools/probe_families.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from calibration_sets import plain_set
from helpers import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from sglp_llm import analyze, prune, replan
from sglp_llm.adapters import adapter_names
from sglp_llm.errors import UserError
from sglp_llm.plan import load_plan, plan_from_indices

sys.path.append(str(ROOT / "tools"))
from probe_families import in_a_process, random_model, token_ids
from tiny_types import tiny_config


@pytest.mark.parametrize("model_type", ["bloom", "cohere2", "deepseek_v3", "granite", "olmo3", "starcoder2"])
def test_every_removal_is_exact(model_type: str) -> None:
    assert model_type not in adapter_names()
    found = in_a_process(model_type)
    assert (found["adapter"], found["removals"]) == ("derived", ["exact"] * 4), found


@pytest.mark.parametrize("compensate", ["linear", "scale", "refit"])
@pytest.mark.parametrize("model_type", ["granite", "starcoder2"])
def test_layers_are_chosen_and_cuts_repaired(model_type: str, compensate: str, tmp_path: Path) -> None:
    random_model(tiny_config(model_type)).save_pretrained(tmp_path / "source")
    ids = plain_set(8, 32)
    report = prune(
        tmp_path / "source", tmp_path / "out", criterion="sglp", compensate=compensate, drop=2, calibration=ids
    )
    assert report.plan.compensation["method"] == compensate
    assert report.verification is not None


def test_where_the_end_of_the_mlp_is_not_found_nothing_is_folded(tmp_path: Path) -> None:
    random_model(tiny_config("deepseek_v3")).save_pretrained(tmp_path / "source")
    ids = plain_set(8, 32)
    settings = {"criterion": "bi", "drop": 2, "calibration": ids}
    report = prune(tmp_path / "source", tmp_path / "out", compensate="auto", **settings)
    assert (report.plan.replaced, report.plan.compensation) == ({}, {})
    with pytest.raises(UserError, match="the linear layer at the end of its MLP was not found; --compensate none"):
        prune(tmp_path / "source", tmp_path / "other", compensate="linear", **settings)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("model_type", ["bloom", "falcon_mamba", "minimax"])
def test_layers_with_other_outputs_and_caches_are_analysed(model_type: str, tmp_path: Path) -> None:
    model = random_model(tiny_config(model_type))
    compensate = "linear" if model_type == "bloom" else "none"
    plan = analyze(model, criterion="sglp", compensate=compensate, drop=2, calibration=plain_set(4, 16)).plan
    assert plan.footprint is not None
    cache = model(input_ids=token_ids(1, 6), use_cache=True).get("past_key_values") or DynamicCache()
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    numbers = [sum(each.numel() for each in pair if isinstance(each, torch.Tensor)) for pair in pairs]
    numbers += [0] * (model.config.num_hidden_layers - len(numbers))
    assert numbers == [6 * cached for cached in plan.footprint.cached]


def test_code_from_before_transformers_had_the_type_is_dropped(tmp_path: Path) -> None:
    """The classes that such a checkpoint names are those that transformers has; other ones are refused."""
    random_model(tiny_config("deepseek_v3")).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    raw = json.loads(file.read_text())
    names = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepSeekV3Model"}
    file.write_text(json.dumps({**raw, "auto_map": names}))
    prune(tmp_path / "source", tmp_path / "out", plan=plan_from_indices(8, [3]), verify=False)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    file.write_text(json.dumps({**raw, "auto_map": {**names, "AutoModelForCausalLM": "modeling.MyForCausalLM"}}))
    with pytest.raises(UserError, match=r"needs remote code \(auto_map: .*MyForCausalLM\)"):
        prune(tmp_path / "source", tmp_path / "other", plan=plan_from_indices(8, [3]), verify=False)


def test_layers_for_multi_token_prediction_are_left_out_and_the_report_says_so(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = random_model(tiny_config("deepseek_v3"))
    model.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    behind = {
        name.replace("layers.7.", "layers.8."): each.clone() for name, each in tensors.items() if "layers.7." in name
    }
    save_file({**tensors, **behind}, source / "model.safetensors", {"format": "pt"})
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "num_nextn_predict_layers": 1}))
    report = prune(source, tmp_path / "out", plan=plan_from_indices(8, [3]), calibration=plain_set(2, 12))
    line = "left out: 1 stored behind the decoder layers, for multi-token prediction from the last of them"
    assert report.notes == (line,)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "layers.7." in name]
    assert report.verification is not None


def test_hidden_states_that_are_no_vector_a_token_are_one_line() -> None:
    with pytest.raises(UserError, match=r"pass on hidden states of shape \[1, 16, 4, 64\], .* with --plan"):
        analyze(random_model(tiny_config("deepseek_v4")), criterion="sglp", drop=2, calibration=plain_set(4, 16))


@pytest.mark.parametrize("verify", [True, False])
def test_what_must_stay_is_not_chosen_and_the_result_says_so(verify: bool, tmp_path: Path) -> None:
    random_model(tiny_config("gpt_neox_japanese")).save_pretrained(tmp_path / "source")
    settings = {"criterion": "reverse", "calibration": plain_set(8), "verify": verify}
    report = prune(tmp_path / "source", tmp_path / "out", drop=2, **settings)
    assert report.plan.removed == (5, 6)
    line = "layer 7 must stay: it alone has a bias behind its attention"
    adapter = f"derived{', verified by logits' if verify else ''}"
    assert load_plan(tmp_path / "out").settings["adapter"] == adapter
    for name in ("README.md", "report.html"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert line in text, name
        assert adapter in text, name
    with pytest.raises(UserError, match=f"at most 7 can go .*{line}"):
        prune(tmp_path / "source", tmp_path / "other", drop=8, **settings)
    with pytest.raises(UserError, match=line):
        prune(tmp_path / "source", tmp_path / "other", plan=plan_from_indices(8, [7]), verify=verify)
    assert not (tmp_path / "other").exists()
    assert replan(tmp_path / "out", drop=3).removed == (4, 5, 6)


@pytest.mark.parametrize("criterion", ["reverse", "sglp", "angular", "slp", "lorp", "sleb", "cka_output", "search"])
def test_every_way_to_choose_keeps_one_layer_with_attention(criterion: str) -> None:
    config = AutoConfig.for_model(
        "lfm2",
        **{key: value for key, value in tiny_config("lfm2").to_dict().items() if key in LFM2},
        num_hidden_layers=6,
        layer_types=["conv", "full_attention", "full_attention", "conv", "conv", "conv"],
    )
    drop = 3 if criterion in ("angular", "sglp", "lorp") else 4
    plan = analyze(random_model(config), criterion=criterion, drop=drop, calibration=plain_set(4, 12)).plan
    assert len(plan.removed) == drop
    assert not {1, 2} <= set(plan.removed)
    assert plan.settings["staying"] == {"one_of": [[[1, 2], NO_ATTENTION]]}


LFM2 = {"vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "conv_L_cache"}
NO_ATTENTION = "without any attention the cache does not know how many tokens it holds"
