"""Checkpoints that cannot be pruned are refused with one line; copies of one checkpoint are told to be the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    QUICK,
    Damage,
    copied,
    edited,
    in_turn,
    run_cli,
    save_tiny,
    tiny_model,
    without,
    written,
)
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sglp_llm.models import find_source

UP = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def tensors(**changes: torch.Tensor | None) -> Damage:
    """Changes or removes tensors of model.safetensors, dots written as double underscores."""

    def damage(folder: Path) -> None:
        stored = {**load_file(folder / "model.safetensors")}
        stored |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
        kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def config(**changes: Any) -> Damage:
    return edited("config.json", **changes)


def sharded(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")


def in_index(name: str, file: str) -> Damage:
    """Shards the checkpoint and says in the index that a tensor is in a file."""

    def damage(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        data["weight_map"][name] = file
        index.write_text(json.dumps(data))

    return in_turn(sharded, damage)


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(name: str, nbytes: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:nbytes])


def adapter_only(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    written("adapter_config.json", "{}")(folder)


NAN = torch.full((48, 32), float("nan"))

DAMAGED: dict[str, tuple[Damage, str]] = {
    "missing shard": (in_turn(sharded, without("model-00002-of-00006.safetensors")), "the checkpoint is incomplete"),
    "index lies": (in_index("model.norm.weight", "model-00001-of-00006.safetensors"), "which does not have it"),
    "index names a ghost": (in_index("ghost", "model-00001-of-00006.safetensors"), "which does not have it"),
    "index leads outside": (in_index("x", "../x.safetensors"), "must be a plain file name"),
    "truncated": (cut("model.safetensors", 200_000), "it is truncated"),
    "empty": (cut("model.safetensors", 0), "not a valid safetensors file"),
    "LFS pointer": (written("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a tensor is missing": (tensors(model__norm__weight=None), "lacks 1 tensors, 'model.norm.weight'"),
    "a tensor of a layer is missing": (tensors(**{UP: None}), f"lacks 1 tensors, '{UP}'"),
    "another shape": (tensors(model__norm__weight=torch.ones(5)), "has the shape [5], and [32] by the configuration"),
    "no weights": (without("model.safetensors"), "no weights: expected model.safetensors"),
    "NaN": (tensors(**{UP: NAN}), f"tensor {UP!r} of decoder layer"),
    "layers missing": (config(num_hidden_layers=8), "says 8 decoder layers, but layer 6 has no tensors"),
    "layers too many": (config(num_hidden_layers=4), "says 4 decoder layers, but there are tensors of layer 4"),
    "depth of 0": (config(num_hidden_layers=0), "num_hidden_layers must be a whole number in 1..10000, not 0"),
    "no config": (without("config.json"), "no config.json"),
    "cut config": (cut("config.json", 100), "config.json: not a JSON file"),
    "binary config": (written("config.json", b"\xff\xfe"), "config.json: not a JSON file"),
    "list for a config": (written("config.json", "[]"), "no model_type"),
    "no model_type": (config(model_type=None), "no model_type"),
    "odd model_type": (config(model_type=5), "no model_type"),
    "misspelt family": (config(model_type="lama"), "did you mean 'llama'?"),
    "another family's class": (config(model_type="bert"), "not the causal language model BertLMHeadModel"),
    "path for a family": (config(model_type="../llama"), "unknown model family"),
    "text for a number": (config(num_hidden_layers="six"), "cannot read the configuration"),
    "heads that do not divide": (config(hidden_size=33), "cannot read the configuration"),
    "unknown activation": (config(hidden_act="nope"), "KeyError: 'nope'"),
    "GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised (GPTQ)"),
    "AWQ": (config(quantization_config={"quant_method": "awq"}), "quantised (AWQ)"),
    "FP8": (config(quantization_config={"quant_method": "fp8"}), "quantised (FP8)"),
    "MLX": (config(quantization={"bits": 4}), "quantised (QUANTIZATION)"),
    "PEFT": (adapter_only, "a PEFT adapter, not a model"),
    "remote code": (config(auto_map={"AutoModelForCausalLM": "code.XForCausalLM"}), "auto_map: XForCausalLM"),
    "remote code in a list": (config(auto_map=["code.X"]), "needs remote code (auto_map: X)"),
    "multimodal": (
        config(model_type="gemma3_vision", text_config={}, vision_config={}),
        "its text model (gemma3_vision_text)",
    ),
    "a wrapper's parts": (config(model_type="gemma3", text_config={}, vision_config={}), "is a LlamaForCausalLM"),
    "classifier": (config(architectures=["LlamaForSequenceClassification"]), "not the causal language model Llama"),
    "bare decoder": (config(architectures=["LlamaModel"]), "is a LlamaModel"),
    "another family's": (config(architectures=["MistralForCausalLM"]), "is a MistralForCausalLM"),
    "no tokenizer": (in_turn(without("tokenizer.json"), without("tokenizer_config.json")), "there is no tokenizer"),
    "odd tokenizer": (written("tokenizer.json", "{}"), "cannot load the tokenizer"),
    "cut tokenizer": (cut("tokenizer.json", 100), "cannot load the tokenizer"),
    "cut .bin": (in_turn(as_bin, cut("pytorch_model.bin", 2000)), "is damaged, or holds code"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_refused_checkpoint(name: str, tiny: Path, tmp_path: Path) -> None:
    damage, message = DAMAGED[name]
    source = copied(tiny, tmp_path / "source", damage)
    outcome = run_cli("prune", source, "-o", tmp_path / "new" / "out", "--drop", 1, *QUICK)
    assert outcome.code == 2, outcome
    assert message in outcome.error
    assert list(tmp_path.iterdir()) == [source]


def test_refused_gpt2_that_divides_by_the_layer_index(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "gpt2", scale_attn_by_inverse_layer_idx=True)
    outcome = run_cli("prune", source, "-o", tmp_path / "out", "--drop", 1, *QUICK)
    assert outcome.code == 2
    assert "scale_attn_by_inverse_layer_idx is set" in outcome.error


@pytest.mark.parametrize("verb", ["prune", "analyze", "eval"])
def test_refused_tokenizer_of_another_model(verb: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", vocab_size=200)
    options = ["--data", "pydoc", "--window", 16] if verb == "eval" else ["-o", tmp_path / "out", "--drop", 1, *QUICK]
    outcome = run_cli(verb, source, *options)
    assert outcome.code == 2, outcome
    assert "the tokenizer does not belong to the model: it gives the token id " in outcome.error
    assert "the model knows 0..199" in outcome.error
    assert list(tmp_path.iterdir()) == [source]


def test_code_in_a_pickle_is_not_run(tiny: Path, tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "was here",)

    def damage(folder: Path) -> None:
        as_bin(folder)
        torch.save({"model.norm.weight": Malice()}, folder / "pytorch_model.bin")

    source = copied(tiny, tmp_path / "source", damage)
    outcome = run_cli("prune", source, "-o", tmp_path / "out", "--drop", 1, *QUICK)
    assert outcome.code == 2, outcome
    assert "holds code beside tensors, which is not run" in outcome.error
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda data: b"", "not a whole GGUF file (it does not begin with GGUF)"),
        (lambda data: b"a text, and a model not at all", "not a whole GGUF file (it does not begin with GGUF)"),
        (lambda data: data[:500], "not a whole GGUF file"),
        (lambda data: data[: len(data) // 2], "not a whole GGUF file"),
        (lambda data: data[:-40], "not a whole GGUF file"),
        (lambda data: data[:300] + bytes(200) + data[500:], "not a whole GGUF file"),
    ],
)
def test_refused_gguf(content: Any, message: str, gguf: Path, tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(content(gguf.read_bytes()))
    outcome = run_cli("prune", source, "-o", tmp_path / "out", "--drop", 1, *QUICK)
    assert outcome.code == 2, outcome
    assert message in outcome.error
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "config.json"])
def test_refused_file_that_is_not_gguf(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    outcome = run_cli("analyze", tmp_path / name)
    assert outcome.code == 2
    assert "expected a folder or a .gguf file" in outcome.error


HARMLESS: dict[str, Damage] = {
    "copy": lambda _: None,
    "shards": sharded,
    "order of keys": lambda folder: written(
        "config.json", json.dumps(dict(reversed(json.loads((folder / "config.json").read_text()).items())))
    )(folder),
    "defaults left out": config(head_dim=None, rms_norm_eps=None, attention_bias=None, rope_parameters=None),
    "architectures left out": config(architectures=None),
    "written by another release": config(transformers_version="4.40.0", torch_dtype="float32"),
    "the same tensors written again": tensors(),
}

TELLING: dict[str, Damage] = {
    "rotary base": config(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
    "epsilon": config(rms_norm_eps=1e-5),
    "dtype": lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder),
    "shape": lambda folder: tiny_model(intermediate_size=64).save_pretrained(folder),
    "depth": lambda folder: tiny_model(num_hidden_layers=5).save_pretrained(folder),
    "one more tensor": tensors(extra=torch.ones(1)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_fingerprint_is_that_of_the_model(name: str, tiny: Path, tmp_path: Path) -> None:
    copy = copied(tiny, tmp_path / "elsewhere", HARMLESS[name])
    assert find_source(copy).identity.fingerprint == find_source(tiny).identity.fingerprint


@pytest.mark.parametrize("name", TELLING)
def test_fingerprint_differs_for_another_model(name: str, tiny: Path, tmp_path: Path) -> None:
    other = copied(tiny, tmp_path / "elsewhere", TELLING[name])
    assert find_source(other).identity.fingerprint != find_source(tiny).identity.fingerprint


def test_gguf_fingerprint(gguf: Path, tmp_path: Path) -> None:
    copy = shutil.copy(gguf, tmp_path / "copy.gguf")
    assert find_source(copy).identity.fingerprint == find_source(gguf).identity.fingerprint
