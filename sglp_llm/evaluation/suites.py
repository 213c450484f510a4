"""Suites of lm-eval tasks, as YAML, and the local files that some tasks read."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglp_llm.calibration.cache import cache_folder
from sglp_llm.errors import UserError, unknown
from sglp_llm.plan.shipped import shipped_suites
from sglp_llm.plan.yaml_files import read_yaml, record_from_dict
from sglp_llm.small_files import read_bytes

DATA_VARIABLE = "SGLP_EVAL_DATA"


@dataclass(frozen=True)
class Suite:
    """Tasks that are run together.

    Attributes:
        name: Name of the suite, for tables and messages.
        tasks: The metric of each task, by the task's name in lm-eval: ``acc``, or ``exact_match,strict-match`` where one
            metric is taken after several filters. An empty one means: acc_norm where the task has it, otherwise its first.
        num_fewshot: Examples in the prompt; none = as each task says.
        limit: Only the first examples of each task.
        include_path: Folder of lm-eval task files; in a suite's file relative to it.
        generate: Script that is run to write the tasks' data into the folder given as its argument; relative in the same way.
    """

    name: str
    tasks: dict[str, str]
    num_fewshot: int | None = None
    limit: int | None = None
    include_path: str | None = None
    generate: str | None = None


def load_suite(name: str | Path) -> Suite:
    """Reads a suite from a YAML file, or one of the suites that come with the package by its name.

    Raises:
        UserError: There is no such file or name, it is not YAML, or not a suite; one line says what is wrong with it.
    """
    path, shipped = Path(name), shipped_suites()
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in shipped:
            raise unknown("suite", str(name), shipped)
        path = shipped[str(name)]
    suite: Suite = record_from_dict(Suite, read_yaml(path, "suite"), str(path))
    if not suite.tasks:
        raise UserError(f"{path}: tasks: there is none")
    check_counts(suite.limit, suite.num_fewshot, f"{path}: ")
    folder, script = (name and str(path.parent / name) for name in (suite.include_path, suite.generate))
    if folder and not Path(folder).is_dir():
        raise UserError(f"{path}: include_path: there is no folder {folder}")
    if script and not Path(script).is_file():
        raise UserError(f"{path}: generate: there is no file {script}")
    return replace(suite, include_path=folder, generate=script)


def suite_of(names: str) -> Suite:
    """The suite of tasks that were named one by one, ``"piqa,arc_easy"``.

    Raises:
        UserError: No name is given.
    """
    tasks = [name.strip() for name in names.split(",") if name.strip()]
    if not tasks:
        raise UserError("--tasks names no task")
    return Suite("tasks", dict.fromkeys(tasks, ""))


def check_counts(limit: int | None, num_fewshot: int | None, where: str = "") -> None:
    """Checks the numbers that a suite and the command line can both set.

    Raises:
        UserError: One is too small.
    """
    if limit is not None and limit < 1:
        raise UserError(f"{where}limit is {limit}; at least 1 example is needed")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"{where}num_fewshot must not be negative, not {num_fewshot}")


def check_batch_size(batch_size: int | str, device: str | None = None) -> None:
    """Checks that it is a positive number, or ``auto`` on a device that can recover from running out of memory.

    Raises:
        UserError: It is neither.
    """
    if batch_size == "auto":
        if device == "cpu":
            raise UserError("batch size auto needs a GPU: the CPU's memory gives no warning before it is full; say N")
    elif not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch size must be auto or a number from 1, not {batch_size!r}")


def data_folder(suite: Suite, given: Path | None) -> Path | None:
    """The folder of the suite's local files: the given one, the one that the suite generates, or ``SGLP_EVAL_DATA``.

    Raises:
        UserError: That is not a folder, or the suite's script failed.
    """
    if given is None and suite.generate is not None:
        return _generated(Path(suite.generate))
    variable = os.environ.get(DATA_VARIABLE)
    chosen = given if given is not None else Path(variable) if variable else None
    if chosen is None:
        return None
    chosen = chosen.expanduser().absolute()
    if not chosen.is_dir():
        raise UserError(f"{chosen}: no such folder ({'--data-dir' if given is not None else DATA_VARIABLE})")
    return chosen


def local_files(task: str, config: Mapping[str, Any], data: Path | None) -> list[Path]:
    """The files that a task reads; none for a task whose data are on the Hub.

    Args:
        task: Its name.
        config: Its lm-eval configuration.
        data: See `data_folder`.

    Raises:
        UserError: One is missing, or no folder is given.
    """
    named = (config.get("dataset_kwargs") or {}).get("data_files")
    if config.get("dataset_path") != "json" or named is None:
        return []
    parts = named.values() if isinstance(named, dict) else [named]
    paths = [Path(file) for part in parts for file in ([part] if isinstance(part, str) else part)]
    if data is None and not all(path.is_absolute() for path in paths):
        raise UserError(f"task {task!r} reads the local file {paths[0]}: give --data-dir DIR, or set {DATA_VARIABLE}")
    files = [path if data is None else data / path for path in paths]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file; the task {task!r} reads it")
    return files


def _generated(script: Path) -> Path:
    """The folder with what the script writes, kept outside the repository and named after the script's content."""
    cache = cache_folder()
    folder = cache / f"{script.stem}-{hashlib.sha256(read_bytes(script, 'script')).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        output = Path(temporary) / "data"
        done = subprocess.run([sys.executable, script, output], capture_output=True, text=True, check=False)
        if done.returncode or not output.is_dir():
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}, and no folder"])[-1]
            raise UserError(f"{script}: cannot generate the data ({reason})")
        try:
            output.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another run has just written the same bytes
                raise
    return folder
