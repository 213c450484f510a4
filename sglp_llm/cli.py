"""The command line: one short function a verb. Heavy imports happen inside the verbs, so that ``--help`` is quick."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sglp_llm import __version__
from sglp_llm.errors import UserError

app = typer.Typer(
    help="Make a large language model shorter: remove whole decoder layers from a Hugging Face checkpoint.",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Hub id, local folder, or PATH.gguf. May stand in the recipe instead."),
]
RequiredModel = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, or PATH.gguf.")]
Revision = Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")]
Dtype = Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32: what is computed in.")]
DeviceMap = Annotated[str | None, typer.Option(help="accelerate's placement, such as auto. Default: one device.")]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="YAML file, or a name from `sglp-llm ls recipes`.")]
Ratio = Annotated[float | None, typer.Option(help="Share of the decoder layers to remove, in (0, 1).")]
Drop = Annotated[int | None, typer.Option(help="Number of decoder layers to remove.")]
TargetParams = Annotated[
    str | None, typer.Option(help="Remove the fewest layers that leave at most this many, e.g. 6.5B.")
]
CriterionName = Annotated[str | None, typer.Option("--criterion", help="sglp, or a name from `sglp-llm ls criteria`.")]
Also = Annotated[list[str] | None, typer.Option(help="Score by this criterion too, in the same pass; repeatable.")]
Calibration = Annotated[
    str | None,
    typer.Option(help="wikitext2, c4, alpaca, bookcorpus, pydoc, text:FILE or jsonl:FILE:field (files plain or .gz)."),
]
Samples = Annotated[int | None, typer.Option(help="Calibration sequences. Default: 32.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens in each. Default: 512.")]
Seed = Annotated[int | None, typer.Option(help="Of everything that is drawn. Default: 0.")]
BatchSize = Annotated[int | None, typer.Option(help="Sequences a forward-only pass computes at once. Default: 8.")]
Segments = Annotated[str | None, typer.Option(help="Number of CKA segments, or auto.")]
Kernel = Annotated[str | None, typer.Option(help="CKA kernel: cosine (default) or linear (the paper's).")]
ProtectFirst = Annotated[int | None, typer.Option(help="Layers at the front that are never removed. Default: 0.")]
ProtectLast = Annotated[int | None, typer.Option(help="Layers at the end that are never removed. Default: 0.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

# Options that decide which layers go.
_DECIDING = [
    "ratio",
    "drop",
    "target_params",
    "criterion",
    "also",
    "segments",
    "kernel",
    "protect_first",
    "protect_last",
]


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
    settings = _settings(locals())
    console = _prepare()
    from sglp_llm.checkpoint.publish import atomic_folder, check_output
    from sglp_llm.pipeline import analyze
    from sglp_llm.plans import PLAN_FILE_NAME, save_plan
    from sglp_llm.recipe import RECIPE_FILE_NAME, save_recipe
    from sglp_llm.source import find_source

    chosen = _recipe(recipe, settings)
    if output is not None:
        check_output(output, overwrite)
        find_source(_named(model, chosen), chosen.revision).check_apart(output)
    analysis = analyze(_named(model, chosen), recipe=chosen, progress=console.progress_bar)
    if output is not None:
        with atomic_folder(output, overwrite) as folder:
            save_plan(analysis.plan, folder / PLAN_FILE_NAME)
            save_recipe(chosen.with_changes(model=_named(model, chosen)), folder / RECIPE_FILE_NAME)
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
    settings = _settings(locals())
    if output is None:
        raise UserError("where to? Give --output FOLDER")
    arguments = locals()
    if plan is not None and (given := [name for name in _DECIDING if arguments[name] is not None]):
        raise UserError(f"--plan already says which layers go: leave out --{given[0].replace('_', '-')}")
    if private and push_to_hub is None:
        raise UserError("--private is about the Hub repository: give --push-to-hub REPO too")
    console = _prepare()
    from sglp_llm.hub import check_repo_name, upload
    from sglp_llm.pipeline import prune
    from sglp_llm.plans import load_plan

    if push_to_hub is not None:
        check_repo_name(push_to_hub)
    chosen = _recipe(recipe, settings)
    report = prune(
        _named(model, chosen),
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
    chosen = _recipe(None, {"dtype": dtype, "revision": revision, "device_map": device_map})
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
    sys.exit(_run())


def _run() -> int:
    usage_error: Any = typer.BadParameter.__mro__[2]  # click's ClickException, wherever this Typer keeps click
    try:
        code = app(prog_name="sglp-llm", standalone_mode=False) or 0
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


def _settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options of a verb that are settings of the recipe, in the recipe's words."""
    from sglp_llm.sizes import parse_count

    names = (
        "ratio drop criterion also calibration samples seq_len seed batch_size kernel "
        "revision dtype device_map max_shard_size"
    )
    settings = {name: arguments.get(name) for name in names.split()}
    settings["also"] = settings["also"] or None
    if (target := arguments["target_params"]) is not None:
        target = parse_count(target)
    segments = arguments["segments"]
    protect = {"first": arguments["protect_first"], "last": arguments["protect_last"]}
    return {
        **settings,
        "target_params": target,
        "segments": int(segments) if segments is not None and re.fullmatch("-?[0-9]+", segments) else segments,
        "protect": {end: number for end, number in protect.items() if number is not None} or None,
    }


def _recipe(name: str | None, settings: dict[str, Any]) -> Any:
    from sglp_llm.recipe import Recipe, load_recipe

    return (Recipe() if name is None else load_recipe(name)).with_changes(**settings)


def _named(model: str | None, recipe: Any) -> str:
    name = recipe.model if model is None else model
    if not name:
        raise UserError("which model? Give MODEL (Hub id, folder or .gguf file), or a recipe that names one")
    return str(name)


if __name__ == "__main__":
    main()
