"""Tiny checkpoints that the hostile ones are copies of."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import save_tiny, tiny_model
from gguf_files import write_gguf
from helpers import tiny_tokenizer


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of six layers, in one file."""
    return save_tiny(tmp_path_factory.mktemp("hostile") / "source")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in shards, with an index."""
    folder = tmp_path_factory.mktemp("hostile") / "sharded"
    tiny_model().save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as GGUF."""
    return write_gguf(tmp_path_factory.mktemp("hostile") / "tiny.gguf")
