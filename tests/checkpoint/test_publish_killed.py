"""kill -9 at any moment of an export: nothing, the old model or the new one, never a broken one."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from sglp_llm.checkpoint import atomic_folder, remove_folder
from sglp_llm.tensor_files import read_index

Content = dict[str, str]
"""What tells two checkpoints apart: what is in the config and a digest of every tensor."""


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Content]:
    """Two checkpoints of 24 MB whose tensors have the same names and shapes, by folder."""
    contents = {}
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps({"seed": seed}))
        size = 4 * 2**20
        header = {
            f"t{n}": {"dtype": "U8", "shape": [size], "data_offsets": [n * size, (n + 1) * size]} for n in range(6)
        }
        text = json.dumps(header).encode()
        data = random.Random(seed).randbytes(6 * size)
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        contents[str(folder)] = content(folder)
    return contents


def content(folder: Path) -> Content:
    """Reads all of a checkpoint.

    Raises:
        ValueError: It is not a checkpoint; half a JSON object is none.
    """
    contents = {"seed": str(json.loads((folder / "config.json").read_text())["seed"])}
    for name, entry in read_index(folder).tensors.items():
        with entry.file.open("rb") as file:
            file.seek(entry.offset)
            contents[name] = hashlib.blake2b(file.read(entry.nbytes)).hexdigest()
    return contents


def check_after_kill(two_models: dict[str, Content], output: Path) -> None:
    for folder in output.parent.iterdir():
        if folder == output:
            assert content(folder) in two_models.values()
        elif (folder / "config.json").exists():  # published any moment, or being removed: not a wrong model in any case
            try:
                left = content(folder)
            except ValueError:
                continue
            assert left in two_models.values()
    with atomic_folder(output, overwrite=True) as folder:
        (folder / "config.json").write_text("{}")
    assert list(output.parent.iterdir()) == [output]


def start(two_models: dict[str, Content], *arguments: object) -> subprocess.Popen[str]:
    script = ROOT / "tests" / "support" / "export_until_killed.py"
    command = [sys.executable, str(script), *two_models, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("mode", ["anew", "replace"])
def test_kill_at_any_moment_leaves_no_broken_model(mode: str, two_models: dict[str, Content], tmp_path: Path) -> None:
    moments = random.Random(mode)
    for number in range(5):
        folder = tmp_path / str(number)
        with start(two_models, folder / "output", mode) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(moments.uniform(0, 0.15))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        if folder.exists():
            check_after_kill(two_models, folder / "output")


# An export of 24 MB in 1 MB chunks: steps 1..24 copy, 25 is the config, 26 and 27 stand before and after the renaming.
@pytest.mark.parametrize("mode", ["anew", "replace"])
@pytest.mark.parametrize(("step", "seed"), [(1, None), (13, None), (25, None), (26, None), (27, 1), (53, 1), (54, 2)])
def test_kill_at_every_kind_of_step(
    mode: str, step: int, seed: int | None, two_models: dict[str, Content], tmp_path: Path
) -> None:
    output = tmp_path / "new" / "output"
    with start(two_models, output, mode, step) as process:
        process.wait()
    assert process.returncode == -signal.SIGKILL
    if mode == "anew" and step == 53:
        seed = None
    assert (json.loads((output / "config.json").read_text())["seed"] if output.exists() else None) == seed
    check_after_kill(two_models, output)


FILES = [f"checkpoint-{n}/{name}" for n in range(2) for name in ("weights", "state")]


def worked_in(folder: Path) -> Path:
    """A folder as a run leaves it that has written ``output``."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def removed_until(step: int, number: int) -> Callable[..., None]:
    """`shutil.rmtree` that removes so many files, and is then sent a signal."""
    rmtree = shutil.rmtree

    def remove(folder: Path, **options: Any) -> None:
        for file in sorted(file for file in folder.rglob("*") if file.is_file())[:step]:
            file.unlink()
        shutil.rmtree = rmtree
        os.kill(os.getpid(), number)
        rmtree(folder, **options)

    return remove


@pytest.mark.parametrize("step", [0, 1, 3])
def test_no_half_folder_is_left_by_a_kill_while_it_is_removed(step: int, tmp_path: Path) -> None:
    work, output = worked_in(tmp_path / "output.healing"), tmp_path / "output"
    child = os.fork()
    if child == 0:
        shutil.rmtree = removed_until(step, signal.SIGKILL)
        remove_folder(work, output)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not work.exists()
    (left,) = tmp_path.iterdir()
    assert len([file for file in left.rglob("*") if file.is_file()]) == len(FILES) - step
    with atomic_folder(output):
        pass
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("step", [0, 1, 3])
def test_nothing_is_left_by_an_interruption_while_a_folder_is_removed(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = worked_in(tmp_path / "output.healing")
    monkeypatch.setattr(shutil, "rmtree", removed_until(step, signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with pytest.raises(KeyboardInterrupt):
        remove_folder(work, tmp_path / "output")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_need_not_be_removed(tmp_path: Path) -> None:
    remove_folder(tmp_path / "output.healing", tmp_path / "output")
    assert list(tmp_path.iterdir()) == []
