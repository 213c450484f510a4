"""A disk that is full at any stage, or read-only: one line, and nothing is left but what a run goes on from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import SMALL, tiny_model
from faulty_runs import LONG_RUNS, RUNS, Run, marked
from forked import Server, hidden
from helpers import tiny_tokenizer
from small_disks import mounted, remount

EVERY = os.environ.get("FAULTS") == "every"
STEPS = 40 if EVERY else 2
PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    with mounted(tmp_path / "disk") as folder:
        yield folder


@pytest.fixture(scope="session")
def bin_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is exported by ``save_pretrained``."""
    import torch

    folder = tmp_path_factory.mktemp("source") / "bin"
    model = tiny_model()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    tiny_tokenizer(bos=True).save_pretrained(folder)
    return folder


BIN = Run("a .bin checkpoint", "prune {bin} -o out --plan {plan} --no-verify")


@pytest.mark.parametrize("run", [*marked(RUNS), BIN, *marked(LONG_RUNS)], ids=str)
def test_full(run: Run, places: dict[str, Path], bin_source: Path, server: Server, disk: Path) -> None:
    places = {**places, "bin": bin_source}
    (disk / "filler").write_bytes(bytes(PAGE))  # a size of 0 would be no limit
    before = shutil.disk_usage(disk).used
    undisturbed = run.prepare(places, disk / "undisturbed")
    old = run.result(undisturbed)
    assert server.run(undisturbed, *run.arguments(places, undisturbed)).code == 0
    whole, took = run.result(undisturbed), shutil.disk_usage(disk).used - before
    shutil.rmtree(undisturbed)

    failures = 0
    for step in range(STEPS):
        folder = run.prepare(places, disk / str(step))
        room = took * (2 * step + 1) // (2 * STEPS)
        remount(disk, f"size={shutil.disk_usage(disk).used // PAGE * PAGE + room // PAGE * PAGE}")
        ended = server.run(folder, *run.arguments(places, folder))
        remount(disk, "size=64m")
        where = f"{run}: with room for {room} of {took} bytes: {ended}"
        if ended.code == 0:
            assert run.result(folder) == whole, where
            continue
        failures += 1
        assert ended.code == 2, where
        assert "cannot be written: " in ended.error, where
        assert hidden(folder) == [], where
        if run.works_in != "out":
            assert run.result(folder) == old, where
        assert {path.name for path in folder.iterdir()} <= {run.works_in, "out.pruned", *(["out"] if old else [])}, (
            where
        )
        again = server.run(folder, *run.arguments(places, folder))
        assert again.code == 0, (where, again.err)
        assert run.result(folder) == whole, where
        shutil.rmtree(folder)
    assert failures > 0


@pytest.mark.parametrize("run", [RUNS[0], BIN], ids=str)
def test_no_file_may_become_larger(
    run: Run, places: dict[str, Path], bin_source: Path, server: Server, tmp_path: Path
) -> None:
    folder = run.prepare(places, tmp_path / "work")
    arguments = run.arguments({**places, "bin": bin_source}, folder)
    ended = server.run(folder, *arguments, file_size=64 * 1024)
    assert (ended.code, ended.error.split(";")[0]) == (2, "out: cannot be written: File too large")
    assert list(folder.iterdir()) == []
    assert server.run(folder, *arguments).code == 0


def test_read_only(places: dict[str, Path], server: Server, disk: Path) -> None:
    folder = RUNS[0].prepare(places, disk / "work")
    remount(disk, "ro")
    journal = replace(
        RUNS[0], command=f"analyze {{source}} --criterion search --drop 1 --journal kept {' '.join(SMALL)}"
    )
    for run, said in ((RUNS[0], "out: cannot make a folder in"), (journal, "kept: cannot be written: Read-only file")):
        ended = server.run(folder, *run.arguments(places, folder))
        assert (ended.code, said in ended.error) == (2, True), ended
