"""The command line: registers the verbs, and turns errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from sglp_llm.cli.verbs.analyze import analyze
from sglp_llm.cli.verbs.bench import bench
from sglp_llm.cli.verbs.compare import compare
from sglp_llm.cli.verbs.evaluate import evaluate
from sglp_llm.cli.verbs.export import export
from sglp_llm.cli.verbs.heal import heal
from sglp_llm.cli.verbs.members import list_members
from sglp_llm.cli.verbs.plan_memory import plan_memory
from sglp_llm.cli.verbs.prune import prune
from sglp_llm.cli.verbs.push import push
from sglp_llm.cli.verbs.replan import replan
from sglp_llm.cli.verbs.report import report
from sglp_llm.errors import UserError
from sglp_llm.processes import process_count, process_index
from sglp_llm.version import __version__

app = typer.Typer(
    help="Make a large language model shorter: remove whole decoder layers from a Hugging Face checkpoint.",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(analyze)
app.command()(prune)
app.command()(replan)
app.command()(heal)
app.command()(report)
app.command()(export)
app.command()(push)
app.command(name="eval")(evaluate)
app.command()(compare)
app.command()(bench)
app.command(name="plan-memory")(plan_memory)
app.command(name="ls")(list_members)

IN_MANY_PROCESSES = ("analyze", "prune", "heal")
"""Verbs that share their work between the processes that a launcher started."""

OUT_OF_MEMORY = (
    "the device is out of memory: --engine streamed holds one layer at a time, --dtype bfloat16 halves the weights of float32, "
    "and a smaller --batch-size or --seq-len leaves fewer activations"
)

_INTERRUPTED = 130
"""The exit code that Typer returns on Ctrl-C, without a message."""


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context, show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    verb = context.invoked_subcommand
    if verb is None and not show:
        raise UserError("what shall be done? See sglp-llm --help")
    if process_count() > 1 and verb is not None and verb not in IN_MANY_PROCESSES:
        raise UserError(
            f"{verb} runs in one process, and a launcher started {process_count()}: "
            f"run it without torchrun or accelerate launch; {' and '.join(IN_MANY_PROCESSES)} share their work"
        )
    if show:
        print(f"sglp-llm {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: exit code 0, 2 for the user's mistake (one line on stderr), 1 otherwise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # printing "±" must not fail where the terminal cannot encode it
    sys.exit(_run())


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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        if process_index() > 0:
            return 1
        return _fail("interrupted", 1)
    except Exception as error:
        if os.environ.get("SGLP_LLM_TRACEBACK") or not _is_expected(error):
            raise
        if type(error).__name__ == "OutOfMemoryError":
            return _fail(f"{OUT_OF_MEMORY} ({' '.join(str(error).split())[:120]})", 1)
        return _fail(str(error), 1)


def _is_expected(error: Exception) -> bool:
    """Whether one line of message suffices: for failures of disk, network and memory, and of our own checks."""
    known = {"UploadError", "VerificationError", "OutOfMemoryError"}
    return isinstance(error, OSError | MemoryError) or type(error).__name__ in known


def _fail(message: str, code: int) -> int:
    print(f"sglp-llm: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
