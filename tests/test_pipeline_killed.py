"""kill -9 at any moment of a real run: the output is absent or complete, and nothing beside it is a wrong model."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import PLAN, logits, run_cli, save_tiny
from helpers import ROOT

pytestmark = pytest.mark.slow

MOMENTS = 10

# Says when the imports are over; what follows is exactly what the command does.
START = """
import sys
from sglp_llm import pipeline
from sglp_llm.cli import main as cli
from sglp_llm.cli.quiet import prepare
prepare()
print("ready", flush=True)
cli.main()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of 3 MB, so that writing takes a while."""
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny", hidden_size=256, intermediate_size=768)


@contextmanager
def started(source: Path, plan: Path, output: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A run whose imports are over."""
    command = [sys.executable, "-c", START, "prune", source, "--plan", plan, "-o", output, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_moment(overwrite: bool, source: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN))
    new = logits(source, skip=(2, 4))
    old = logits(source, skip=(0,))
    options = ["--overwrite"] if overwrite else []

    with started(source, plan, tmp_path / "whole" / "out") as process:
        start = time.monotonic()
        process.communicate()
        duration = time.monotonic() - start
    assert torch.equal(logits(tmp_path / "whole" / "out"), new)

    moments = random.Random(f"overwrite: {overwrite}")
    killed = 0
    for number in range(MOMENTS):
        output = tmp_path / str(number) / "out"
        if overwrite:
            (tmp_path / "old.json").write_text(json.dumps({"num_layers": 6, "removed": [0]}))
            assert run_cli("prune", source, "-o", output, "--plan", tmp_path / "old.json", "--no-verify").code == 0
        with started(source, plan, output, *options) as process:
            # One in each tenth of the run, so that no stage of it is left out.
            time.sleep(duration * (number + moments.random()) / MOMENTS)
            process.kill()
            process.communicate()
        killed += process.returncode == -signal.SIGKILL
        allowed = [new, old] if overwrite else [new]
        if overwrite:
            assert output.exists()
        if output.exists():
            assert any(torch.equal(logits(output), whole) for whole in allowed)
        for folder in output.parent.glob(".*") if output.parent.exists() else ():
            if folder.name == ".out.lock":  # of a dead run, which holds nothing
                continue
            assert folder.name.startswith(".out.partial-")
            try:
                left = logits(folder)
            except Exception:  # it does not load, as it should not: which way depends on how far it came
                continue
            assert any(torch.equal(left, whole) for whole in allowed)
        assert run_cli("prune", source, "-o", output, "--plan", plan, "--overwrite", "--no-verify").code == 0
        assert list(output.parent.iterdir()) == [output]
    assert killed >= MOMENTS // 2
