"""Runs a command on hostile inputs: it must end in time, in little memory, with one line, and leave the disk as it was."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from checkpoints import Outcome, run_cli
from huggingface_hub import constants
from hypothesis import HealthCheck, Phase

SECONDS = 60
"""The longest processor time a command may take, and a fifth of the longest time; most take a tenth of a second."""

MEMORY = 2 * 2**30
"""What a command may reserve beyond what the process has already."""

LONGEST = 300
"""Characters of a message."""

BEGINNING = "sglp-llm: error: "

INPUTS = int(os.environ.get("SGLP_FUZZ_INPUTS", "500"))
"""How many hostile inputs are tried in all."""

PERCENT = {
    "configurations": 6,
    "tokenizers": 6,
    "generation settings": 4,
    "safetensors": 6,
    "indices": 3,
    "GGUF": 5,
    "options of prune": 11,
    "options of other verbs": 7,
    "plans": 9,
    "what plans tell": 7,
    "tensors of plans": 3,
    "recipes": 9,
    "healing recipes": 4,
    "suites": 4,
    "plans of mergekit": 4,
    "journals": 5,
    "texts": 7,
}
"""How many of a hundred inputs are of a kind; one test a kind."""
assert sum(PERCENT.values()) == 100

FUZZ: dict[str, Any] = {
    "deadline": None,
    "derandomize": "SGLP_FUZZ_INPUTS" not in os.environ,
    "database": None,
    "phases": [Phase.generate],  # the first failure is small enough, and a smaller one takes long to find
    "suppress_health_check": list(HealthCheck),
}
"""Of every test with hostile inputs: the same inputs at every call, unless their number is given."""


def share(kind: str) -> int:
    """How many inputs of a kind are tried."""
    return max(1, INPUTS * PERCENT[kind] // 100)


class TooLong(BaseException):
    """Not an `Exception`, which the program might catch."""


@contextmanager
def guarded(seconds: int = SECONDS) -> Iterator[None]:
    """Inside the block the process is interrupted when it takes too long, and gets no memory beyond `MEMORY` more."""

    def stop(*_: object) -> None:
        raise TooLong(f"no end after {seconds} s: {''.join(traceback.format_stack(limit=12))}")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    before = [(number, signal.signal(number, stop)) for number in (signal.SIGALRM, signal.SIGPROF)]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(5 * seconds)  # a wait takes no processor time
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before:
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@contextmanager
def working_folder() -> Iterator[Path]:
    """Inside the block an empty folder is the current one, and no library asks the Hub."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as place, patch.object(constants, "HF_HUB_OFFLINE", True):
        os.chdir(place)
        try:
            yield Path(place)
        finally:
            os.chdir(before)


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Size, time of the last change and kind of everything in a folder, at any depth."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root) / name
            status = path.lstat()
            found[str(path)] = (status.st_size if path.is_file() else 0, status.st_mtime_ns, status.st_mode)
    return found


def message(outcome: Outcome) -> str:
    """The line that says why a command failed; forecasts, and the bars and warnings of libraries, may stand before it."""
    *before, said = outcome.err.replace("\r", "\n").splitlines()
    assert said.startswith(BEGINNING), outcome.err
    assert not any(line.startswith(BEGINNING) for line in before), outcome.err
    return said


def attempt(
    *arguments: object,
    inputs: Path,
    output: Path | None = None,
    codes: tuple[int, ...] = (0, 2),
    journal: Path | None = None,
) -> int:
    """Runs a command on hostile inputs, and checks how it ends.

    Args:
        *arguments: Of ``sglp-llm``.
        inputs: A folder with every input; it must not change.
        output: What the command may write. It must be there whole after exit code 0, and not at all otherwise. Nothing may
            be beside it.
        codes: The exit codes that it may end with; 1 stands for a failure of ours.
        journal: A file beside the output that the command was told to keep.

    Returns:
        The exit code.
    """
    before = state(inputs)
    beside = None if output is None else set(output.parent.iterdir())
    with guarded():
        try:
            outcome = run_cli(*arguments)
        except (Exception, TooLong, SystemExit) as error:
            said = "".join(traceback.format_exception(error)[-6:])
            pytest.fail(f"a traceback: {' '.join(map(str, arguments))[:500]}\n{said[-3000:]}", pytrace=False)
    shown = f"{outcome.code}: {' '.join(map(str, arguments))[:500]}\n{outcome.err[:1000]}"
    assert outcome.code in codes, shown
    if outcome.code:
        said = message(outcome)
        assert len(said) <= LONGEST, shown
        assert said.removeprefix(BEGINNING).strip(), shown
        assert said.isprintable(), shown
        assert "Traceback" not in outcome.err, shown
    assert state(inputs) == before, shown
    if output is not None:
        assert beside is not None
        left = set(output.parent.iterdir()) - beside - {journal}
        assert left == ({output} if outcome.code == 0 else set()), (shown, left)
    return outcome.code


def encoded(argument: str) -> bool:
    """Whether the system can hand such an argument to a program."""
    try:
        return "\0" not in os.fsdecode(os.fsencode(argument)) and sys.getfilesystemencoding() == "utf-8"
    except UnicodeEncodeError:
        return False
