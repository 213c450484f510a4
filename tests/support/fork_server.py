"""Runs the command line in forked children of one process whose imports are over, and lets something happen at one moment.

Usage: fork_server.py SOURCE. Reads one JSON object a line on stdin, see `Request`, and answers with one on stdout. SOURCE is a
checkpoint that is pruned once, so that what is imported late is imported before the first fork.

A moment is a change of the file system that Python code is about to make: a file opened for writing, a folder made, something
renamed or removed. They are counted by an audit hook, so that the n-th of a run is the same one at every run.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Request:
    """One run.

    Attributes:
        arguments: Of ``sglp-llm``.
        folder: The current folder; changes outside it are not counted.
        printed: A folder for ``stdout``, ``stderr`` and the number of ``moments``.
        at: The moment, from 1; 0 for none.
        do: What happens then, see `_happen`.
        seconds: When SIGALRM ends the run, inside a call into C too; 0 for never.
        environment: Set for the run.
        file_size: The most bytes that a file may have; 0 for no limit.
        closed: Whether stdin, stdout and stderr are closed.
    """

    arguments: list[str]
    folder: str
    printed: str
    at: int = 0
    do: list[str] = field(default_factory=list)
    seconds: float = 0
    environment: dict[str, str] = field(default_factory=dict)
    file_size: int = 0
    closed: bool = False


def _happen(do: list[str]) -> None:
    what, *rest = do
    if what == "signal":
        os.kill(os.getpid(), int(rest[0]))
    elif what == "truncate":
        os.truncate(rest[0], int(rest[1]))
    elif what == "remove":
        (shutil.rmtree if os.path.isdir(rest[0]) else os.unlink)(rest[0])  # noqa: PTH112
    elif what == "copy":
        shutil.copyfile(rest[0], rest[0] + ".new")
        Path(rest[0] + ".new").replace(rest[0])
    elif what == "wait":  # says that the moment has come, and goes on when the file is gone
        file = Path(rest[0])
        file.touch()
        while file.exists():
            time.sleep(0.01)
    else:
        raise ValueError(do)


def _child(request: Request) -> None:
    from sglp_llm.cli import main as cli

    moments, happening = 0, False

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal moments, happening
        if happening or event not in _CHANGES or (event == "open" and not int(arguments[2] or 0) & _WRITING):
            return
        if not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(arguments[0])
        if path.startswith("/") and not path.startswith(request.folder):
            return
        moments += 1
        if moments == request.at:
            happening = True
            try:
                _happen(request.do)
            finally:
                happening = False

    printed = Path(request.printed)
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(printed / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    os.chdir(request.folder)
    os.environ.update(request.environment)
    sys.argv = ["sglp-llm", *request.arguments]
    if request.file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request.file_size, request.file_size))
    if request.closed:
        os.closerange(0, 3)
        sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]
    sys.addaudithook(count)
    signal.setitimer(signal.ITIMER_REAL, request.seconds)
    code = 99
    try:
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 98
    happening = True  # what follows is no part of the run
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.stdout.flush()
    sys.stderr.flush()
    (printed / "moments").write_text(str(moments))
    os._exit(code)


def main(source: str) -> None:
    from sglp_llm.cli import main as cli
    from sglp_llm.comparison import compare  # noqa: F401
    from sglp_llm.healing import heal  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["sglp-llm", "prune", source, "-o", f"{folder}/out", "--plan", "1", "--json"]
        answers, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: PTH123, SIM115
        assert cli._run() == 0
        sys.stdout = answers
    print("ready", flush=True)
    for line in sys.stdin:
        request = Request(**json.loads(line))
        child = os.fork()
        if child == 0:
            _child(request)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
