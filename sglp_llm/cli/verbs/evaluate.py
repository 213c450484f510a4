"""``sglp-llm eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sglp_llm.cli import completion, panels
from sglp_llm.cli.options import (
    DeviceMap,
    Engine,
    Json,
    Quiet,
    RequiredModel,
    Revision,
    Scratch,
    number_or_word,
    recipe_of,
)
from sglp_llm.cli.quiet import prepare
from sglp_llm.cli.recording import Record, RecordingFolder, folder_to_record
from sglp_llm.errors import UserError

PERPLEXITY_ONLY = ("data", "window", "max_windows", "bos")
TASKS_ONLY = ("limit", "num_fewshot", "data_dir", "output")


def evaluate(
    model: RequiredModel,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Text to score: as for --calibration, NAME:train or NAME:test picks a split. Default: wikitext2.",
            rich_help_panel=panels.MEASURED,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens in one non-overlapping window. Default: 2048.", rich_help_panel=panels.MEASURED
        ),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(metavar="N", help="Score only the first windows.", rich_help_panel=panels.MEASURED)
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            help="Begin every window with BOS. Default: as the tokenizer does.", rich_help_panel=panels.MEASURED
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            autocompletion=completion.a_suite,
            help="Run lm-eval tasks instead: a name from `sglp-llm ls suites`, or a YAML file.",
            rich_help_panel=panels.MEASURED,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Run these lm-eval tasks instead, as in piqa,arc_easy.",
            rich_help_panel=panels.MEASURED,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="Only the first examples of each task.", rich_help_panel=panels.MEASURED),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(metavar="N", help="Examples in the prompt of a task.", rich_help_panel=panels.MEASURED)
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the JSONL files of the suite offline. Default: $SGLP_EVAL_DATA.",
            rich_help_panel=panels.MEASURED,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for lm-eval's MODEL/results_TIME.json.",
            rich_help_panel=panels.OUTPUT,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="OTHER", help="Score this model too, and print both side by side.", rich_help_panel=panels.MEASURED
        ),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="N|auto", help="Windows, or sequences of a task, computed at once.", rich_help_panel=panels.MEMORY
        ),
    ] = "1",
    revision: Revision = None,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="auto, bfloat16, float16 or float32.", rich_help_panel=panels.MEMORY)
    ] = "auto",
    device_map: DeviceMap = None,
    engine: Engine = None,
    scratch: Scratch = None,
    record: Record = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a model, with data set, window, tokens and standard error; or its scores in tasks of lm-eval."""
    arguments = dict(locals())
    if suite is not None and tasks is not None:
        raise UserError("--suite already says which tasks: leave out --tasks")
    in_tasks = suite is not None or tasks is not None
    for name in PERPLEXITY_ONLY if in_tasks else TASKS_ONLY:
        if arguments[name] is not None:
            other = "is about perplexity: leave it out" if in_tasks else "is about tasks: give --suite or --tasks too"
            raise UserError(f"--{name.replace('_', '-')} {other}")
    given = number_or_word(batch_size)
    number = given if isinstance(given, int) else batch_size
    console = prepare(quiet)
    settings: dict[str, Any] = {"dtype": dtype, "revision": revision, "device_map": device_map}
    # For the memory prediction: an evaluation takes what an analysis of hidden states alone takes.
    settings |= {"criterion": "bi", "samples": 1, "seq_len": max(2, window or 2048)}
    settings |= {"engine": engine, "scratch": scratch}
    chosen = recipe_of(None, {key: value for key, value in settings.items() if value is not None})
    folder = folder_to_record(model) if record else None
    models: list[tuple[str, str | None]] = [(model, chosen.revision)]
    if baseline is not None:
        models.append((baseline, None))
    elif folder is not None:
        models.append(folder.original)
    if in_tasks:
        suite_tasks = _open_suite(suite, tasks, limit, num_fewshot, number, data_dir)
        opened_models = _open_both(models, chosen, folder)
        _score_tasks(console, opened_models, suite_tasks, limit, num_fewshot, number, output, folder, as_json)
        return
    if isinstance(number, str):
        raise UserError(f"--batch-size must be a number of windows, not {batch_size!r}")
    from sglp_llm.calibration import check_spec

    text = "wikitext2" if data is None else data
    check_spec(text)
    opened_models = _open_both(models, chosen, folder)
    options = {"window": 2048 if window is None else window, "max_windows": max_windows, "bos": bos}
    _score_text(console, opened_models, text, options, number, folder, as_json)


def _open_both(models: list[tuple[str, str | None]], chosen: Any, folder: RecordingFolder | None) -> list[Any]:
    """Opens both models before the first is scored, which can take hours; their weights are loaded in turn."""
    from dataclasses import replace

    from sglp_llm.analysis import open_model

    opened = [open_model(name, replace(chosen, revision=revision)) for name, revision in models]
    if folder is not None:
        folder.check_original(opened[1])
    return opened


def _open_suite(
    suite: str | None,
    tasks: str | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int | str,
    data_dir: Path | None,
) -> Any:
    """The requested tasks, with their data."""
    from sglp_llm.evaluation.suites import check_batch_size, check_counts, load_suite, suite_of

    check_counts(limit, num_fewshot)
    check_batch_size(batch_size)
    wanted = load_suite(suite) if suite is not None else suite_of(tasks or "")
    from sglp_llm.evaluation.harness import open_suite

    return open_suite(wanted, data_dir)


def _score_tasks(
    console: Any,
    opened_models: list[Any],
    suite_tasks: Any,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int | str,
    output: Path | None,
    folder: RecordingFolder | None,
    as_json: bool,
) -> None:
    """Runs the tasks on one model after the other, and prints the table."""
    from sglp_llm.evaluation.harness import evaluate_tasks, scores
    from sglp_llm.evaluation.side_by_side import compare

    results, dtype = [], ""
    for opened in opened_models:
        dtype = str(opened.load().model.dtype).removeprefix("torch.")
        results.append(
            evaluate_tasks(
                opened.load().model,
                opened.tokenizer,
                suite_tasks,
                limit=limit,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                name=opened.identity.name,
                output=output,
            )
        )
        opened.release()
    names = [opened.identity.name for opened in opened_models]
    both = [scores(result, suite_tasks) for result in results]
    rows = compare(*both) if len(both) > 1 else compare(both[0], None)
    if folder is not None:
        examples = "all examples" if limit is None else f"first {limit} examples"
        shots = "" if num_fewshot is None else f", {num_fewshot} in the prompt"
        folder.keep_scores(rows, f"suite {suite_tasks.suite.name}, {examples}{shots}, {dtype}")
    if as_json:
        report = {"suite": suite_tasks.suite.name, "scores": console.scores_to_dict(rows), "results": results[0]}
        if len(names) > 1:
            report |= {"baseline": names[1], "baseline_results": results[1]}
        console.print_json({"model": names[0], **report})
    else:
        console.print_scores(rows, *names)
        if output is not None:
            print(f"\nWritten   {output}")


def _score_text(
    console: Any,
    opened_models: list[Any],
    data: str,
    options: dict[str, Any],
    batch_size: int,
    folder: RecordingFolder | None,
    as_json: bool,
) -> None:
    """Measures the perplexity of one model after the other, and prints it."""
    from dataclasses import asdict

    from sglp_llm.calibration import evaluation_windows
    from sglp_llm.evaluation.perplexity import perplexity
    from sglp_llm.evaluation.side_by_side import compare, perplexity_score

    results, dtype = [], ""
    for opened in opened_models:
        windows = evaluation_windows(opened.tokenizer, data, **options)
        opened.check_tokens(windows.input_ids)
        dtype = str(opened.load().model.dtype).removeprefix("torch.")
        results.append(perplexity(opened.load(), windows, batch_size=batch_size, progress=console.progress_bar))
        opened.release()
    names = [opened.identity.name for opened in opened_models]
    reports = [{"model": name, **asdict(result)} for name, result in zip(names, results, strict=True)]
    if len(names) == 1:
        if as_json:
            console.print_json(reports[0])
        else:
            console.print_perplexity(results[0], names[0])
        return
    rows = compare(*([perplexity_score(result)] for result in results))
    if folder is not None:
        folder.keep_scores(rows, f"{results[0].windows} windows of {results[0].window} tokens, {dtype}")
    if as_json:
        console.print_json({**reports[0], "baseline": reports[1], "ratio": rows[0].ratio})
        return
    for result, name in zip(results, names, strict=True):
        console.print_perplexity(result, name)
        print()
    console.print_scores(rows, *names)
