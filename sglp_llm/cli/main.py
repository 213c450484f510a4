"""The command line: registers the verbs, and turns errors into messages and exit codes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from sglp_llm.cli import panels
from sglp_llm.cli.command import Command, Group
from sglp_llm.cli.verbs.analyze import analyze
from sglp_llm.cli.verbs.bench import bench
from sglp_llm.cli.verbs.compare import compare
from sglp_llm.cli.verbs.doctor import doctor
from sglp_llm.cli.verbs.evaluate import evaluate
from sglp_llm.cli.verbs.export import export
from sglp_llm.cli.verbs.heal import heal
from sglp_llm.cli.verbs.members import list_members
from sglp_llm.cli.verbs.plan_memory import plan_memory
from sglp_llm.cli.verbs.prune import prune
from sglp_llm.cli.verbs.push import push
from sglp_llm.cli.verbs.replan import replan
from sglp_llm.cli.verbs.report import report
from sglp_llm.errors import UserError, is_failure, one_line
from sglp_llm.processes import process_count, process_index
from sglp_llm.version import __version__

app = typer.Typer(
    cls=Group,
    help="Make a large language model shorter: remove whole decoder layers from a Hugging Face checkpoint.",
    epilog="sglp-llm prune HuggingFaceTB/SmolLM2-135M-Instruct --ratio 0.2 --output smollm2-20",
    rich_markup_mode=None,  # `Command` writes the help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(name: str, verb: Callable[..., None], panel: str, example: str) -> None:
    app.command(name, cls=Command, rich_help_panel=panel, epilog=f"sglp-llm {name} {example}")(verb)


_add("prune", prune, panels.PRUNE, "HuggingFaceTB/SmolLM2-135M-Instruct --ratio 0.2 --output smollm2-20")
_add("analyze", analyze, panels.PRUNE, "HuggingFaceTB/SmolLM2-135M-Instruct --preset paper --output analysis")
_add("replan", replan, panels.PRUNE, "analysis --ratio 0.3 --output thirty.json")
_add("heal", heal, panels.PRUNE, "smollm2-20 --data wikitext2 --tokens 320k --output healed")
_add("eval", evaluate, panels.MEASURE, "smollm2-20 --baseline HuggingFaceTB/SmolLM2-135M-Instruct --data wikitext2")
_add("bench", bench, panels.MEASURE, "smollm2-20 --baseline HuggingFaceTB/SmolLM2-135M-Instruct")
_add(
    "compare", compare, panels.MEASURE, "HuggingFaceTB/SmolLM2-135M-Instruct --criteria paper,bi,fast --output compared"
)
_add("report", report, panels.HAND_ON, "smollm2-20")
_add("export", export, panels.HAND_ON, "smollm2-20 --to mergekit")
_add("push", push, panels.HAND_ON, "smollm2-20 me/smollm2-20 --private")
_add("plan-memory", plan_memory, panels.LOOK_UP, "meta-llama/Llama-3.1-8B --preset paper --scratch states")
_add("ls", list_members, panels.LOOK_UP, "criteria")
_add("doctor", doctor, panels.LOOK_UP, "--json")

IN_MANY_PROCESSES = ("analyze", "prune", "heal")
"""Verbs that share their work between the processes that a launcher started."""

_OF_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)
"""What is wrong with a name that was given, wherever it is noticed."""
OUT_OF_MEMORY = (
    "the device is out of memory: --engine streamed holds one layer at a time, --dtype bfloat16 halves the weights of float32, "
    "and a smaller --batch-size or --seq-len leaves fewer activations"
)

_LIBRARIES = ("transformers", "tokenizers", "lm_eval", "datasets", "gguf", "jinja2", "peft")
"""Those that are given what others have written, apart from text and numbers that we have checked."""

_ALLOCATION = "DefaultCPUAllocator"
_WITHOUT_WORDS: dict[type, str] = {MemoryError: "out of memory"}
_BY_SIGNAL = 128
"""A shell's exit code of a program that a signal ended is this and the signal's number: 130 for Ctrl-C, 143 for SIGTERM."""

_INTERRUPTED = _BY_SIGNAL + signal.SIGINT
"""What Typer makes of a `KeyboardInterrupt`, without a message."""

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a run to end."""

_received: list[int] = []
"""The one of them that this run was sent: an exception that says which does not come through Typer."""


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context, show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    verb = context.invoked_subcommand
    if verb is None and not show:
        typer.echo(context.get_help())
    if process_count() > 1 and verb is not None and verb not in IN_MANY_PROCESSES:
        raise UserError(
            f"{verb} runs in one process, and a launcher started {process_count()}: "
            f"run it without torchrun or accelerate launch; {' and '.join(IN_MANY_PROCESSES)} share their work"
        )
    if show:
        print(f"sglp-llm {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: exit code 0, 2 for the user's mistake (one line on stderr), 128 + N after signal N, 1 otherwise."""
    _open_closed_streams()
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(number, _end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # printing "±" must not fail where the terminal cannot encode it
    code = _run()
    try:
        sys.stdout.flush()
    except OSError:  # the interpreter would try again at its end, and print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _open_closed_streams() -> None:
    """Gives stdin, stdout and stderr, where they are closed, to the null device.

    The next file that is opened would get the number of a closed one, and what a library prints would go into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            os.set_inheritable(number, True)
            if null != number:
                os.close(null)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))


def _end(number: int, frame: object) -> None:
    """Ends a run as Ctrl-C does, so that nothing half-written is left; no second signal disturbs that."""
    if multiprocessing.parent_process() is not None:  # a worker of a library's pool, which ends its workers in this way
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)
    _received.append(number)
    raise KeyboardInterrupt


def _run() -> int:
    usage_error: Any = typer.BadParameter.__mro__[2]  # click's ClickException, wherever this Typer keeps click
    try:
        code = app(prog_name="sglp-llm", standalone_mode=False) or 0
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.stdout.flush()
        return code
    except (UserError, usage_error) as error:
        format_message = getattr(error, "format_message", None)
        if process_index() > 0:  # the main process prints the message: it has the same error, or received this one
            return 2
        return _fail(format_message() if format_message else str(error), 2)
    except BrokenPipeError:  # the reader of stdout has closed it, as in `sglp-llm ls criteria | head -3`
        return 1
    except (KeyboardInterrupt, typer.Abort):
        code = _BY_SIGNAL + (_received[0] if _received else signal.SIGINT)
        return code if process_index() > 0 else _fail("interrupted", code)
    except BaseException as error:
        if os.environ.get("SGLP_LLM_TRACEBACK") or not is_failure(error):
            raise
        if isinstance(error, OSError) and error.errno in _OF_NAMES:
            return _fail(f"{error.filename}: cannot be used ({error.strerror})", 2)
        if not _is_expected(error):
            if (library := _foreign(error)) is None:
                raise
            return _fail(f"{library} cannot use what it was given ({type(error).__name__}: {error})", 2)
        if type(error).__name__ == "OutOfMemoryError":
            return _fail(f"{OUT_OF_MEMORY} ({' '.join(str(error).split())[:120]})", 1)
        return _fail(str(error) or _WITHOUT_WORDS.get(type(error), type(error).__name__), 1)


def _is_expected(error: BaseException) -> bool:
    """Whether one line of message suffices: for failures of disk, network and memory, and of our own checks."""
    known = {"UploadError", "VerificationError", "OutOfMemoryError"}
    return isinstance(error, OSError | MemoryError) or type(error).__name__ in known or _ALLOCATION in str(error)


def _foreign(error: BaseException) -> str | None:
    """The library that raised an error of its own about a checkpoint, a text or a task; ``None`` where it was our code.

    What a file may say to them is theirs to know: a configuration that loads can still name an activation that is a number.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        parts = Path(frame.filename).parts
        if "sglp_llm" in parts:
            return None
        if found := next((name for name in _LIBRARIES if name in parts), None):
            return found
    return None


def _fail(message: str, code: int) -> int:
    with suppress(OSError):  # a terminal that is gone
        print(f"sglp-llm: error: {one_line(message)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
