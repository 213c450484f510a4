"""A run that ends inside a call into C, as by SIGKILL: the output is absent or complete, and nothing beside it is a wrong model.

`test_killed` ends runs where Python code is about to change the file system. Here the moment is a time, and most of the time
goes into writing tensors.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import PLAN, logits, save_tiny
from forked import SURVIVED, Server, serving

pytestmark = pytest.mark.slow

MOMENTS = 10


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of 3 MB, so that writing takes a while."""
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny", hidden_size=256, intermediate_size=768)


@pytest.fixture(scope="module")
def runs(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(large, tmp_path_factory.mktemp("printed")) as running:
        yield running


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_time(
    overwrite: bool, large: Path, runs: Server, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    plan, new, old = tmp_path / "plan.json", logits(large, skip=(2, 4)), logits(large, skip=(0,))
    plan.write_text(json.dumps(PLAN))
    words = ["prune", large, "-o", "out", "--plan", plan, "--overwrite"]
    begun = tmp_path / "begun"
    begun.mkdir()
    if overwrite:
        assert runs.run(begun, "prune", large, "-o", "out", "--plan", "0", "--no-verify").code == 0
    whole = tmp_path / "whole"
    shutil.copytree(begun, whole)
    start = time.monotonic()
    assert runs.run(whole, *words).code == 0
    duration = time.monotonic() - start
    assert torch.equal(logits(whole / "out"), new)

    moments = random.Random(f"overwrite: {overwrite}")
    for number in range(MOMENTS):
        # One in each tenth of the run, so that no stage of it is left out; earlier if the run was faster than the first.
        share = (number + moments.random()) / MOMENTS
        for attempt in range(10):
            folder = tmp_path / f"{number}-{attempt}"
            shutil.copytree(begun, folder)
            ended = runs.run(folder, *words, seconds=duration * share * 0.8**attempt)
            if ended.code == -signal.SIGALRM:
                break
            assert ended.code == 0, ended.err
        assert ended.code == -signal.SIGALRM
        output = folder / "out"
        assert output.exists() or not overwrite
        if output.exists():
            assert any(torch.equal(logits(output), allowed) for allowed in ([new, old] if overwrite else [new]))
        for left in folder.glob(".*"):
            if left.name == ".out.lock":  # of a dead run, which holds nothing
                continue
            assert left.name.startswith(".out.partial-")
            try:
                found = logits(left)
            except Exception:  # it does not load, as it should not: which way depends on how far it came
                continue
            assert any(torch.equal(found, allowed) for allowed in (new, old))
        assert runs.run(folder, *words).code == 0
        assert list(folder.iterdir()) == [output]
        record_property(SURVIVED, ("prune over an old output" if overwrite else "prune", signal.SIGALRM.name))
