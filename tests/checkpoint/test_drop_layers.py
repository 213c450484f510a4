"""A live model of every family, shortened in place: it must compute, generate and save like one that was never deeper.

The oracle is the model itself before the cut, the removed layers' ``forward`` replaced by a pass-through written in the tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import (
    REMOVED,
    Tiny,
    assert_cache_changes_nothing,
    every_tiny,
    kept_without,
    load_plain,
    logits_of,
    random_model,
    save_tiny,
    shortened_logits,
    tensors_of,
    tiny_model,
    token_ids,
)
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sglp_llm import CalibrationSet, UserError, drop_layers, prune
from sglp_llm.checkpoint.export import shortened
from sglp_llm.plan import plan_from_indices

TINY = pytest.mark.parametrize("tiny", every_tiny(), ids=str)

# Of every family that mixes two kinds of attention, the layers of one kind.
ONE_KIND = [(Tiny("gemma2", 0), "sliding_attention"), (Tiny("gemma2", 0), "full_attention")]
ONE_KIND += [(Tiny("gemma3_text", 1), "sliding_attention"), (Tiny("gemma3_text", 1), "full_attention")]
ONE_KIND += [(Tiny("qwen2", 1), "sliding_attention"), (Tiny("qwen2", 1), "full_attention")]
ONE_KIND += [(Tiny("qwen3", 1), "sliding_attention"), (Tiny("smollm3", 1), "sliding_attention")]


def layers_of(model: PreTrainedModel, tiny: Tiny) -> nn.ModuleList:
    layers = model.get_submodule(tiny.adapter.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def given_ids() -> CalibrationSet:
    ids = token_ids()
    return CalibrationSet(ids, torch.ones_like(ids, dtype=torch.bool), "by hand", 0, "by hand", False)


@TINY
def test_the_live_model_computes_generates_and_saves(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny_model(tiny)
    expected = shortened_logits(model, tiny.adapter.layers, REMOVED)
    before = list(layers_of(model, tiny))
    assert drop_layers(model, REMOVED) is model
    layers = layers_of(model, tiny)
    kept = kept_without(tiny.depth, REMOVED)
    assert all(layer is before[old] for layer, old in zip(layers, kept, strict=True))
    for index, layer in enumerate(layers):
        assert {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")} == {index}
    assert torch.equal(logits_of(model), expected)
    assert_cache_changes_nothing(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_plain(tmp_path)), expected)


@TINY
def test_a_second_cut_counts_from_the_shortened_model(tiny: Tiny, tmp_path: Path) -> None:
    """Cutting 1 and 3, then 0 and 2 of what is left, is cutting 0, 1, 3 and 4."""
    model, whole = drop_layers(tiny_model(tiny), REMOVED), tiny_model(tiny)
    drop_layers(model, plan_from_indices(tiny.depth - len(REMOVED), [0, 2]))
    expected = shortened_logits(whole, tiny.adapter.layers, (0, 1, 3, 4))
    assert torch.equal(logits_of(model), expected)
    assert_cache_changes_nothing(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_plain(tmp_path)), expected)


@pytest.mark.parametrize(("tiny", "kind"), ONE_KIND, ids=str)
def test_all_layers_of_one_kind_of_attention_removed(tiny: Tiny, kind: str, tmp_path: Path) -> None:
    model = tiny_model(tiny)
    removed = tuple(layer for layer, other in enumerate(model.config.layer_types) if other == kind)
    assert 0 < len(removed) < tiny.depth
    source = save_tiny(model, tmp_path / "source")
    expected = shortened_logits(model, tiny.adapter.layers, removed)
    prune(source, tmp_path / "out", plan=plan_from_indices(tiny.depth, removed))
    for shorter in (load_plain(tmp_path / "out"), drop_layers(model, removed)):
        assert kind not in shorter.config.layer_types
        assert torch.equal(logits_of(shorter), expected)
        assert_cache_changes_nothing(shorter)


@pytest.mark.parametrize("tiny", [Tiny("opt", 0), Tiny("gpt2", 0), Tiny("llama", 0)], ids=str)
def test_prune_of_a_live_model_in_training_mode(tiny: Tiny, tmp_path: Path) -> None:
    """Dropout and LayerDrop must not reach the reload check, and the model stays in the mode it was in."""
    model = tiny_model(tiny)
    expected = shortened_logits(model, tiny.adapter.layers, REMOVED)
    model.train()
    model.get_input_embeddings().eval()
    report = prune(model, tmp_path / "out", plan=plan_from_indices(tiny.depth, REMOVED), calibration=given_ids())
    assert report.verification is not None
    assert report.verification["max_difference"] == 0
    assert all(module.training for module in layers_of(model, tiny).modules())
    assert not model.get_input_embeddings().training
    assert torch.equal(logits_of(load_plain(tmp_path / "out")), expected)
    assert torch.equal(logits_of(model.eval()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@TINY
def test_prune_of_a_live_model_that_was_cast(tiny: Tiny, dtype: torch.dtype, tmp_path: Path) -> None:
    """``to`` casts the rotary frequencies too; a reloaded model has them in float32, and is no less right for that."""
    model = tiny_model(tiny).to(dtype)
    before = {name: buffer.dtype for name, buffer in model.named_buffers()}
    report = prune(model, tmp_path / "out", plan=plan_from_indices(tiny.depth, REMOVED), calibration=given_ids())
    assert report.verification is not None
    assert report.verification["max_difference"] == 0
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == before


@pytest.mark.parametrize("depth", [5, 12])
def test_a_plan_of_another_depth_leaves_the_live_model_alone(depth: int, tmp_path: Path) -> None:
    tiny = Tiny("llama", 0)
    model = tiny_model(tiny)
    before = logits_of(model)
    plan = plan_from_indices(depth, [depth - 1])
    with pytest.raises(UserError, match=f"{depth} decoder layers"):
        prune(model, tmp_path / "out", plan=plan, calibration=given_ids())
    with pytest.raises(UserError, match=f"{depth} decoder layers"):
        drop_layers(model, plan)
    assert not (tmp_path / "out").exists()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([6], "layer 6 is not in 0..5"),
        ([-1], "layer -1 is not in 0..5"),
        ([1, 1], "twice"),
        ([], "no layer would be removed"),
        (range(6), "at least one must stay"),
        ([True], "whole numbers"),
    ],
)
def test_indices_that_do_not_fit(removed: list[int], message: str) -> None:
    model = tiny_model(Tiny("llama", 0))
    with pytest.raises(UserError, match=message):
        drop_layers(model, removed)
    assert len(model.model.layers) == model.config.num_hidden_layers == 6


def test_a_live_model_that_depends_on_the_index_is_refused() -> None:
    settings = {**Tiny("gpt2", 0).settings, "scale_attn_by_inverse_layer_idx": True}
    with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx is set"):
        drop_layers(random_model("gpt2", **settings), REMOVED)


@pytest.mark.parametrize(
    ("family", "leftovers"),
    [
        ("gpt2", {"attn.bias": torch.ones(1, 1, 128, 128).tril(), "attn.masked_bias": torch.tensor(-1e4)}),
        (
            "gpt_neox",
            {"attention.bias": torch.ones(1, 1, 128, 128).tril(), "attention.rotary_emb.inv_freq": torch.ones(2)},
        ),
        ("llama", {"self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    ],
)
def test_buffers_that_old_releases_stored_do_not_disturb(
    family: str, leftovers: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """GPT-2, Pythia and Llama on the Hub still hold them; transformers ignores them on loading."""
    tiny = Tiny(family, 0)
    model = tiny_model(tiny)
    source = save_tiny(model, tmp_path / "source")
    tensors = tensors_of(source)
    for layer in range(tiny.depth):
        tensors |= {f"{tiny.adapter.layers}.{layer}.{name}": value.clone() for name, value in leftovers.items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    prune(source, tmp_path / "out", plan=plan_from_indices(tiny.depth, REMOVED))
    expected = shortened_logits(model, tiny.adapter.layers, REMOVED)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_a_model_that_was_shortened_for_a_while_is_what_it_was(tiny: Tiny) -> None:
    model = tiny_model(tiny)
    logits, config = logits_of(model), model.config.to_dict()
    with shortened(model, (1, 3)) as shorter:
        assert torch.equal(logits_of(shorter), logits_of(drop_layers(tiny_model(tiny), (1, 3))))
    assert torch.equal(logits_of(model), logits)
    assert model.config.to_dict() == config
