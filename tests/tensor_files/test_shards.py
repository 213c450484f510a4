"""Splitting into shards and writing their index, against transformers itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from sglp_llm.errors import UserError
from sglp_llm.tensor_files import TensorEntry, read_index
from sglp_llm.tensor_files.writer import group_by_size, write_shards


def ignore(_: int) -> None:
    """The `Advance` nobody listens to."""


def entry(name: str, nbytes: int) -> tuple[str, TensorEntry]:
    return name, TensorEntry(name, "U8", (nbytes,), Path("nowhere"), 0, nbytes)


@settings(derandomize=True)
@given(sizes=st.lists(st.integers(0, 30), max_size=20), limit=st.integers(1, 40))
def test_grouping_is_that_of_transformers(sizes: list[int], limit: int) -> None:
    tensors = [entry(str(number), size) for number, size in enumerate(sizes)]
    shards = group_by_size(tensors, limit)
    if not sizes:
        assert shards == []
        return
    oracle = split_state_dict_into_shards_factory(
        dict(tensors), get_storage_size=lambda entry: entry.nbytes, max_shard_size=limit, filename_pattern="{suffix}"
    )
    assert [[name for name, _ in shard] for shard in shards] == list(oracle.filename_to_tensors.values())


@pytest.mark.parametrize("size", [0, -1])
def test_shard_size_must_be_positive(size: int) -> None:
    with pytest.raises(UserError, match="at least 1 byte"):
        group_by_size([], size)


@pytest.mark.parametrize("limit", ["2KB", "1GB"])
def test_shards_and_index_are_those_of_transformers(limit: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=limit == "2KB",
    )
    model = LlamaForCausalLM(config)
    saved, copied = tmp_path / "saved", tmp_path / "copied"
    model.save_pretrained(saved, max_shard_size=limit)
    index = read_index(saved)
    shards = group_by_size(((name, index.tensors[name]) for name in model.state_dict() if name in index.tensors), 10**9)
    if limit == "2KB":
        shards = group_by_size(shards[0], 2000)
        assert len(shards) > 3
    copied.mkdir()
    shutil.copy(saved / "config.json", copied)
    write_shards(copied, shards, index.metadata, ignore)
    assert {file.name for file in copied.glob("*safetensors*")} == {file.name for file in saved.glob("*safetensors*")}
    if limit == "2KB":
        name = "model.safetensors.index.json"
        assert (copied / name).read_text() == (saved / name).read_text()
    again, info = LlamaForCausalLM.from_pretrained(copied, output_loading_info=True)
    assert not any(info.values())
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
