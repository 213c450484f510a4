"""Runs of the command line that cost no imports, see `fork_server`."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fork_server import Request
from helpers import ROOT

SURVIVED = "survived"
"""A property of a test, as often as it survived a kill: the command and the signal."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, negative where a signal ended it, what it printed, and the moments it had."""

    code: int
    out: str
    err: str
    moments: int

    @property
    def error(self) -> str:
        """The one line of a run that failed as it should, without progress and the line of the memory prediction."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("sglp-llm: error: ")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0], self.err
        return lines[0].removeprefix("sglp-llm: error: ")


class Server:
    """The process that forks; made by `serving`."""

    def __init__(self, process: subprocess.Popen[str], printed: Path) -> None:
        self._process, self._printed = process, printed

    def run(self, folder: Path, *arguments: object, **more: object) -> Ended:
        """One run in this folder, to its end. For ``more`` see `Request`."""
        self.start(folder, *arguments, **more)
        return self.end()

    def start(self, folder: Path, *arguments: object, **more: object) -> None:
        """Begins a run."""
        for file in self._printed.iterdir():
            file.unlink()
        request = Request(list(map(str, arguments)), str(folder), str(self._printed), **more)  # type: ignore[arg-type]
        assert self._process.stdin is not None
        print(json.dumps(asdict(request)), file=self._process.stdin, flush=True)

    def end(self) -> Ended:
        """Waits for the run that was begun."""
        assert self._process.stdout is not None
        code = int(self._process.stdout.readline())
        files = (self._printed / name for name in ("stdout", "stderr", "moments"))
        out, err, moments = (file.read_text() if file.exists() else "0" for file in files)
        return Ended(code, out, err, int(moments))


@contextmanager
def serving(source: Path, printed: Path) -> Iterator[Server]:
    """A server that has pruned this checkpoint once; what runs print goes to the other folder."""
    command = [sys.executable, ROOT / "tests" / "support" / "fork_server.py", source]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Server(process, printed)
        assert process.stdin is not None
        process.stdin.close()


def contents(folder: Path, *names: str) -> dict[str, str]:
    """A digest of every file below a folder, or of those whose names match; empty where there is no folder."""
    found = {file for name in names or ("*",) for file in folder.rglob(name) if file.is_file()}
    return {str(file.relative_to(folder)): hashlib.blake2b(file.read_bytes()).hexdigest() for file in sorted(found)}


def hidden(folder: Path) -> list[str]:
    """What a run keeps under hidden names while it works, and no longer."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*")]
