"""Hostile checkpoints: configuration, tokenizer, generation settings, safetensors header and index, GGUF."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from checkpoints import SMALL, copied
from hostile import FUZZ, attempt, share
from hostile_data import ODD_FILES, as_json, changed, damaged, file_like
from hypothesis import given, settings
from hypothesis import strategies as st

RESIDENT = ("--engine", "resident")  # no prediction of memory, which takes most of the time
PLANNED = ("--plan", "2,4", *SMALL[:2])
HEADER = 8

WAYS = {
    "copy": ("prune", *PLANNED, *RESIDENT, "--no-verify"),
    "check": ("prune", *PLANNED, *RESIDENT),
    "pack": ("prune", *PLANNED, *RESIDENT, "--no-verify"),
    "stream": ("prune", *PLANNED, "--engine", "streamed"),
    "analyse": ("prune", "--drop", "2", "--criterion", "bi", *SMALL, *RESIDENT),
    "predict": ("plan-memory",),
}


def run(inputs: Path, model: Path, way: str) -> int:
    """Runs one of `WAYS` on a model in the folder ``inputs``."""
    verb, *options = WAYS[way]
    if verb == "plan-memory":
        return attempt(verb, model, *options, inputs=inputs)
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / ("out.gguf" if way == "pack" else "out")
        return attempt(verb, model, *options, "--output", output, inputs=inputs, output=output)


def run_with(source: Path, name: str, content: bytes, way: str) -> int:
    """The same on a copy of a checkpoint with one other file."""
    with tempfile.TemporaryDirectory() as place:
        folder = copied(source, Path(place) / "model")
        (folder / name).write_bytes(content)
        return run(Path(place), folder, way)


def test_the_good_ones_pass(source: Path, sharded: Path, gguf: Path) -> None:
    """Otherwise nothing behind the first check would be tried."""
    of_folders = [way for way in WAYS if way != "pack"]  # a GGUF file is made of another one alone
    assert [run(source, source, way) for way in of_folders] == [0] * len(of_folders)
    assert [run(sharded, sharded, way) for way in ("copy", "check")] == [0, 0]
    assert [run(gguf.parent, gguf, way) for way in ("check", "pack", "predict")] == [0, 0, 0]


@settings(max_examples=share("configurations"), **FUZZ)
@given(data=st.data(), way=st.sampled_from(sorted(WAYS)))
def test_configurations(source: Path, data: st.DataObject, way: str) -> None:
    good = json.loads((source / "config.json").read_text())
    run_with(source, "config.json", data.draw(file_like(good)), way)


TOKENIZER = {
    "tokenizer_config.json": {
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "add_bos_token": True,
        "model_max_length": 10**30,
    },
    "tokenizer.json": {},
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}},
    "added_tokens.json": {"<new>": 300},
    "chat_template.jinja": {},
}


@settings(max_examples=share("tokenizers"), **FUZZ)
@given(data=st.data(), name=st.sampled_from(sorted(TOKENIZER)), way=st.sampled_from(["check", "analyse"]))
def test_tokenizers(source: Path, data: st.DataObject, name: str, way: str) -> None:
    file = source / name
    good = {**(json.loads(file.read_text()) if file.exists() else {}), **TOKENIZER[name]}
    content = data.draw(st.binary(max_size=50) | ODD_FILES if name.endswith(".jinja") else file_like(good))
    run_with(source, name, content, way)


GENERATION = {
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
    "max_length": 20,
    "temperature": 0.5,
    "do_sample": True,
    "stop_strings": ["a"],
    "prompt_lookup_num_tokens": 3,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "num_beams": 4,
    "forced_eos_token_id": 1,
    "cache_implementation": "static",
    "watermarking_config": {"greenlist_ratio": 0.25},
    "compile_config": {"fullgraph": True},
    "transformers_version": "5.0.0",
}


@settings(max_examples=share("generation settings"), **FUZZ)
@given(data=st.data(), way=st.sampled_from(["check", "check", "copy", "analyse"]))
def test_generation_settings(source: Path, data: st.DataObject, way: str) -> None:
    run_with(source, "generation_config.json", data.draw(file_like(GENERATION)), way)


@pytest.mark.parametrize(
    "legal",
    [
        {"stop_strings": ["a"]},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"num_beams": 4, "early_stopping": True},
        {"do_sample": True, "temperature": 0.1},
        {"cache_implementation": "offloaded"},
    ],
    ids=str,
)
def test_legal_generation_settings_change_nothing_in_the_reload_check(source: Path, legal: dict[str, object]) -> None:
    assert run_with(source, "generation_config.json", as_json(legal), "check") == 0


@settings(max_examples=share("safetensors"), **FUZZ)
@given(data=st.data(), way=st.sampled_from(["copy", "check", "stream", "analyse"]))
def test_safetensors(source: Path, data: st.DataObject, way: str) -> None:
    good = (source / "model.safetensors").read_bytes()
    size = int.from_bytes(good[:HEADER], "little")
    header, tensors = json.loads(good[HEADER : HEADER + size]), good[HEADER + size :]
    if data.draw(st.booleans()):
        text = data.draw(changed(header).map(as_json))
        content = len(text).to_bytes(HEADER, "little") + text + tensors
    else:
        content = data.draw(damaged(good[: HEADER + size])) + tensors
    run_with(source, "model.safetensors", content, way)


@settings(max_examples=share("indices"), **FUZZ)
@given(data=st.data(), way=st.sampled_from(["copy", "check"]))
def test_indices(sharded: Path, data: st.DataObject, way: str) -> None:
    name = "model.safetensors.index.json"
    run_with(sharded, name, data.draw(file_like(json.loads((sharded / name).read_text()))), way)


@settings(max_examples=share("GGUF"), **FUZZ)
@given(data=st.data(), way=st.sampled_from(["copy", "check", "predict", "pack"]))
def test_gguf(gguf: Path, data: st.DataObject, way: str) -> None:
    good = gguf.read_bytes()
    end = 24_000  # fields, and the tensors' names and shapes
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "tiny.gguf"
        file.write_bytes(data.draw(damaged(good[:end])) + good[end:])
        run(Path(place), file, way)
