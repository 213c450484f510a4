"""The command line: one short function a verb. Heavy imports happen inside the verbs, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from sglp_llm import __version__
from sglp_llm.errors import UserError
from sglp_llm.options import (
    DECIDING,
    Also,
    BatchSize,
    Calibration,
    CriterionName,
    DeviceMap,
    Drop,
    Dtype,
    Json,
    Kernel,
    Model,
    ProtectFirst,
    ProtectLast,
    Ratio,
    RecipeName,
    RequiredModel,
    Revision,
    Samples,
    Seed,
    Segments,
    SeqLen,
    TargetParams,
    model_of,
    recipe_of,
    settings_of,
)

app = typer.Typer(
    help="Make a large language model shorter: remove whole decoder layers from a Hugging Face checkpoint.",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_INTERRUPTED = 130
"""What Typer makes of Ctrl-C, without a word."""


@app.command()
def analyze(
    model: Model = None,
    recipe: RecipeName = None,
    ratio: Ratio = None,
    drop: Drop = None,
    target_params: TargetParams = None,
    criterion: CriterionName = None,
    also: Also = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    segments: Segments = None,
    kernel: Kernel = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    revision: Revision = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for sglp_plan.json.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Decide which layers to remove and show why. Writes nothing without --output. Default budget: a quarter."""
    settings = settings_of(locals())
    console = _prepare()
    from sglp_llm.checkpoint.publish import atomic_folder, check_output
    from sglp_llm.pipeline import analyze
    from sglp_llm.plans import PLAN_FILE_NAME, save_plan
    from sglp_llm.recipe import RECIPE_FILE_NAME, save_recipe
    from sglp_llm.source import find_source

    chosen = recipe_of(recipe, settings, model)
    if output is not None:
        check_output(output, overwrite)
        find_source(model_of(model, chosen), chosen.revision).check_apart(output)
    analysis = analyze(model_of(model, chosen), recipe=chosen, progress=console.progress_bar)
    if output is not None:
        with atomic_folder(output, overwrite) as folder:
            save_plan(analysis.plan, folder / PLAN_FILE_NAME)
            save_recipe(chosen.with_changes(model=model_of(model, chosen)), folder / RECIPE_FILE_NAME)
    if as_json:
        console.print_json(console.analysis_to_dict(analysis))
    else:
        console.print_analysis(analysis)


@app.command()
def prune(
    model: Model = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    recipe: RecipeName = None,
    plan: Annotated[Path | None, typer.Option(help="Export this sglp_plan.json instead of analysing.")] = None,
    ratio: Ratio = None,
    drop: Drop = None,
    target_params: TargetParams = None,
    criterion: CriterionName = None,
    also: Also = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    batch_size: BatchSize = None,
    segments: Segments = None,
    kernel: Kernel = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    revision: Revision = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest weight file, e.g. 2GB. Default: like the source.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if it exists.")] = False,
    verify: Annotated[bool, typer.Option(help="Reload the result and compare it with the source.")] = True,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the finished folder to the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Create the Hub repository private.")] = False,
    as_json: Json = False,
) -> None:
    """Remove layers and write a smaller checkpoint that plain from_pretrained loads."""
    settings = settings_of(locals())
    if output is None:
        raise UserError("where to? Give --output FOLDER")
    arguments = locals()
    if plan is not None and (given := [name for name in DECIDING if arguments[name] is not None]):
        raise UserError(f"--plan already says which layers go: leave out --{given[0].replace('_', '-')}")
    if private and push_to_hub is None:
        raise UserError("--private is about the Hub repository: give --push-to-hub REPO too")
    console = _prepare()
    from sglp_llm.hub import check_repo_name, upload
    from sglp_llm.pipeline import prune
    from sglp_llm.plans import load_plan

    if push_to_hub is not None:
        check_repo_name(push_to_hub)
    chosen = recipe_of(recipe, settings, model)
    report = prune(
        model_of(model, chosen),
        output,
        plan=None if plan is None else load_plan(plan),
        recipe=chosen,
        calibration="pydoc" if plan is not None and recipe is None and calibration is None else None,
        overwrite=overwrite,
        verify=verify,
        progress=console.progress_bar,
    )
    if as_json:
        console.print_json(console.report_to_dict(report))
    else:
        console.print_report(report)
    if push_to_hub is not None:
        address = upload(output, push_to_hub, private)
        print(f"Uploaded          {address}", file=sys.stderr if as_json else sys.stdout)


@app.command(name="eval")
def evaluate(
    model: RequiredModel,
    data: Annotated[
        str, typer.Option(help="Text to score: as for --calibration, NAME:train or NAME:test picks a split.")
    ] = "wikitext2",
    window: Annotated[int, typer.Option(help="Tokens in one non-overlapping window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Score only the first windows.")] = None,
    bos: Annotated[
        bool | None, typer.Option(help="Begin every window with BOS. Default: as the tokenizer does.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows computed at once.")] = 1,
    revision: Revision = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Perplexity of a model, with data set, window, tokens and standard error."""
    console = _prepare()
    from dataclasses import asdict

    from sglp_llm.calibration import evaluation_windows
    from sglp_llm.evaluation.perplexity import perplexity
    from sglp_llm.subject import Subject
    from sglp_llm.texts import check_spec

    check_spec(data)
    chosen = recipe_of(None, {"dtype": dtype, "revision": revision, "device_map": device_map})
    subject = Subject(model, chosen.revision, chosen.dtype, chosen.device_map)
    windows = evaluation_windows(subject.tokenizer, data, window=window, max_windows=max_windows, bos=bos)
    subject.check_tokens(windows.input_ids)
    result = perplexity(subject.load().model, windows, batch_size=batch_size, progress=console.progress_bar)
    if as_json:
        console.print_json({"model": model, **asdict(result)})
    else:
        console.print_perplexity(result, model)


@app.command(name="ls")
def list_members(
    what: Annotated[str, typer.Argument(metavar="adapters|criteria|recipes")], as_json: Json = False
) -> None:
    """What there is: model families, criteria, recipes."""
    console = _prepare()
    from sglp_llm.catalog import catalog

    title, columns, rows = catalog(what)
    if as_json:
        console.print_json({what: [dict(zip(columns, row, strict=True)) for row in rows]})
    else:
        console.print_table(title, columns, rows)


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context, show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if context.invoked_subcommand is None and not show:
        raise UserError("what shall be done? See sglp-llm --help")
    if show:
        print(f"sglp-llm {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: exit code 0, 2 for the user's mistake (one line on stderr), 1 otherwise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that does not know "±" is no reason to fail
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
        return _fail(format_message() if format_message else str(error), 2)
    except BrokenPipeError:  # whoever read stdout has seen enough, as in `sglp-llm ls criteria | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 1)
    except Exception as error:
        if os.environ.get("SGLP_LLM_TRACEBACK") or not _is_expected(error):
            raise
        return _fail(str(error), 1)


def _is_expected(error: Exception) -> bool:
    """Failures of the world (disk, network, memory) and of our own checks: one line says all there is to say."""
    known = {"UploadError", "VerificationError", "OutOfMemoryError"}
    return isinstance(error, OSError | MemoryError) or type(error).__name__ in known


def _fail(message: str, code: int) -> int:
    print(f"sglp-llm: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _prepare() -> Any:
    """Silences the libraries' own bars and notices, and imports what prints."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars would fill a log file
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from sglp_llm import console

    return console


if __name__ == "__main__":
    main()
