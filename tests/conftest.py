"""What holds for every test."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from local_hub import TOKEN, LocalHub

# The models are tiny: threads that wait for each other cost more than they bring, a hundred times more on a busy machine.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported by now stays: collections, of which every training makes some, need not look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A running Hub that huggingface_hub uses in this process, and no other cache or login; waits are not waited for."""
    with LocalHub().running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        template = f"{running.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: running.waits.append(seconds))
        yield running
