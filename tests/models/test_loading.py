"""What can be pruned besides safetensors: .bin files, GGUF, live models; and what of a checkpoint is carried over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    QUICK,
    copied,
    edited,
    in_turn,
    logits,
    logits_of,
    run_cli,
    save_tiny,
    tiny_model,
    written,
)
from gguf_files import gguf_model, write_gguf
from helpers import tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglp_llm import UserError, analyze, prune
from sglp_llm.calibration import calibration_set
from sglp_llm.checkpoint.export import drop_layers
from sglp_llm.models import find_source
from sglp_llm.models.loading import load_model, load_tokenizer
from sglp_llm.plan import plan_from_indices

QUICKLY: dict[str, Any] = {"criterion": "sglp", "calibration": "pydoc", "samples": 4, "seq_len": 16}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded_bin(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    for number, shard in enumerate(shards):
        torch.save({name: stored[name] for name in list(stored)[number::2]}, folder / shard)
    weight_map = {name: shards[number % 2] for number, name in enumerate(stored)}
    written("pytorch_model.bin.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}))(folder)


@pytest.mark.parametrize("damage", [as_bin, sharded_bin])
def test_bin_files(damage: Any, tiny: Path, tmp_path: Path) -> None:
    terms = in_turn(damage, written("LICENSE.md", "terms"))
    source, output = copied(tiny, tmp_path / "source", terms), tmp_path / "out"
    outcome = run_cli("prune", source, "-o", output, "--drop", 2, "--criterion", "reverse", *QUICK)
    assert outcome.code == 0, outcome
    assert torch.equal(logits(output), logits(tiny, skip=(4, 5)))
    files = {path.name for path in output.iterdir()}
    assert not any(name.startswith("pytorch_model") for name in files)
    assert {"model.safetensors", "LICENSE.md", "generation_config.json", "tokenizer.json"} <= files
    assert (output / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


def test_bin_files_are_not_preferred_to_safetensors(tiny: Path, tmp_path: Path) -> None:
    both = copied(tiny, tmp_path / "both", written("pytorch_model.bin", "rubbish"))
    assert find_source(both).format == "safetensors"
    assert load_model(find_source(both)).num_layers == 6


def test_gguf(gguf: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    outcome = run_cli("prune", gguf, "-o", output, "--drop", 1, *QUICK)
    assert outcome.code == 0, outcome
    removed = tuple(json.loads((output / "sglp_plan.json").read_text())["removed"])
    assert torch.equal(logits(output), logits_of(gguf_model(), skip=removed))
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    text = "The cat sat on the mat, naïvely."
    assert AutoTokenizer.from_pretrained(output)(text) == AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name
    )(text)


def test_gguf_loads_in_the_asked_dtype_and_as_a_plain_model(gguf: Path) -> None:
    source = find_source(gguf)
    assert load_model(source).model.dtype == torch.float32
    model = load_model(source, dtype="bfloat16").model
    assert model.dtype == torch.bfloat16
    assert getattr(model, "hf_quantizer", None) is None
    assert load_tokenizer(source)("the cat")["input_ids"] == tiny_tokenizer()("the cat")["input_ids"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_analysis_in_half_precision_exports_the_source_as_it_is(dtype: str, tiny: Path, tmp_path: Path) -> None:
    # Without BOS: its embedding is all zeros in the tiny model, and gradients of such tokens overflow in float16.
    source = copied(tiny, tmp_path / "source", tiny_tokenizer().save_pretrained)
    outcome = run_cli("prune", source, "-o", tmp_path / "out", "--drop", 1, "--dtype", dtype, "--json", *QUICK)
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    assert report["verification"]["dtype"] == dtype
    assert report["plan"]["settings"]["dtype"] == dtype
    assert torch.equal(logits(tmp_path / "out"), logits(tiny, skip=tuple(report["plan"]["removed"])))


def test_bin_files_are_exported_in_the_asked_dtype(tiny: Path, tmp_path: Path) -> None:
    source = copied(tiny, tmp_path / "source", as_bin)
    assert run_cli("prune", source, "-o", tmp_path / "out", "--drop", 1, "--dtype", "bfloat16", *QUICK).code == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_device_map(tiny: Path, tmp_path: Path) -> None:
    plans = []
    for name, options in (("plain", ()), ("spread", ("--device-map", "auto"))):
        outcome = run_cli("prune", tiny, "-o", tmp_path / name, "--drop", 2, *QUICK, *options)
        assert outcome.code == 0, outcome
        plans.append(json.loads((tmp_path / name / "sglp_plan.json").read_text()))
    assert plans[0]["scores"] == plans[1]["scores"]
    assert plans[1]["settings"]["device_map"] == "auto"


@pytest.mark.parametrize("given", ["text", "tokens"])
def test_live_model(given: str, tiny: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(bos=True)
    analysis = analyze(tiny, drop=2, **QUICKLY)
    options: dict[str, Any] = QUICKLY
    if given == "tokens":
        sequences = calibration_set(tokenizer, "pydoc", samples=4, seq_len=16)
        options = {"criterion": "sglp", "calibration": sequences}
    live = analyze(tiny_model(), tokenizer=tokenizer, drop=2, **options)
    assert (live.plan.kept, live.plan.scores) == (analysis.plan.kept, analysis.plan.scores)
    assert live.plan.settings["seq_len"] == 16

    model = tiny_model()
    report = prune(model, tmp_path / "out", tokenizer=tokenizer, drop=2, **options)
    assert report.plan.kept == analysis.plan.kept
    assert model.config.num_hidden_layers == 4
    expected = logits(tiny, skip=report.plan.removed)
    assert torch.equal(logits(tmp_path / "out"), expected)
    assert torch.equal(logits_of(model), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat") == tokenizer("the cat")


def test_plan_of_a_checkpoint_on_the_live_model(tiny: Path, tmp_path: Path) -> None:
    plan = analyze(tiny, drop=2, **QUICKLY).plan
    prune(tiny_model(), tmp_path / "out", plan=plan, verify=False)
    assert torch.equal(logits(tmp_path / "out"), logits(tiny, skip=plan.removed))


def test_live_model_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a live model needs tokenizer="):
        prune(tiny_model(), tmp_path / "out", drop=1, **QUICKLY)
    model = tiny_model()
    prune(model, tmp_path / "out", plan=plan_from_indices(6, [1, 3]), verify=False)
    assert torch.equal(logits(tmp_path / "out"), logits_of(tiny_model(), skip=(1, 3)))


def test_live_model_refusals(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match="at most 5 can go"):
        prune(tiny_model(), tmp_path / "out", tokenizer=tokenizer, drop=6, **QUICKLY)
    with pytest.raises(UserError, match="for a model of 8 decoder layers, and LlamaForCausalLM has 6"):
        prune(tiny_model(), tmp_path / "out", plan=plan_from_indices(8, [7]), tokenizer=tokenizer)
    plan = analyze(tiny_model("qwen2"), tokenizer=tokenizer, drop=1, **QUICKLY).plan
    with pytest.raises(UserError, match="made for another model"):
        prune(tiny_model(), tmp_path / "out", plan=plan, tokenizer=tokenizer)
    with pytest.raises(UserError, match="the tokenizer does not belong to the model"):
        analyze(tiny_model(vocab_size=100), tokenizer=tokenizer, drop=1, **QUICKLY)
    assert not (tmp_path / "out").exists()


def test_dropping_layers_of_a_live_model_by_hand() -> None:
    model = drop_layers(tiny_model(), [0, 5])
    assert torch.equal(logits_of(model), logits_of(tiny_model(), skip=(0, 5)))


CARRIED: dict[str, str] = {
    # transformers' own save_pretrained refuses this one.
    "generation_config.json": '{"temperature": 0.5, "do_sample": false, "top_p": 0.9}',
    "chat_template.jinja": "{% for message in messages %}{{ message.content }}{% endfor %}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "LICENSE": "Nobody may read this.",
    "LICENSE.txt": "Or this.",
    "USE_POLICY.md": "Be good.",
    "NOTICE": "Noted.",
    "special_tokens_map.json": '{"eos_token": "</s>"}',
}


@pytest.mark.parametrize("damage", [lambda _: None, as_bin], ids=["safetensors", "bin"])
def test_what_belongs_to_a_checkpoint_is_carried_over_as_it_is(damage: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = copied(tiny, tmp_path / "source" / "model", damage)
    (source / "additional_chat_templates").mkdir()
    in_turn(*(written(name, text) for name, text in CARRIED.items()), written("training.log", "private"))(source)
    outcome = run_cli("prune", source, "-o", tmp_path / "out", "--drop", 1, *QUICK)
    assert outcome.code == 0, outcome
    for name in (*CARRIED, "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    assert not (tmp_path / "out" / "training.log").exists()
    AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template([{"role": "user", "content": "hi"}])


def test_auto_map_left_over_from_before_phi3_was_merged_is_dropped(tmp_path: Path) -> None:
    remote = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    source = save_tiny(tmp_path / "source", "phi3")
    edited("config.json", auto_map=remote)(source)
    outcome = run_cli("prune", source, "-o", tmp_path / "out", "--drop", 1, *QUICK)
    assert outcome.code == 0, outcome
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
