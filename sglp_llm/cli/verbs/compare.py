"""``sglp-llm compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sglp_llm.cli import completion, panels
from sglp_llm.cli.options import (
    Calibration,
    DeviceMap,
    Dtype,
    Json,
    Kernel,
    Model,
    Option,
    ProtectFirst,
    ProtectLast,
    Quiet,
    RecipeName,
    Revision,
    Samples,
    Seed,
    Segments,
    SeqLen,
    TrialSamples,
    healing_recipe_of,
    model_of,
    recipe_of,
    settings_of,
)
from sglp_llm.cli.quiet import prepare, say
from sglp_llm.errors import UserError, disk_of


def compare(
    model: Model = None,
    criteria: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Criteria and presets, separated by commas; angular+linear has a compensation, +heal trains.",
            rich_help_panel=panels.METHOD,
        ),
    ] = "sglp,bi",
    ratios: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES",
            help="Shares to remove, separated by commas. Default: 0.1,0.2,0.3.",
            rich_help_panel=panels.BUDGET,
        ),
    ] = None,
    drops: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS", help="Numbers of layers to remove, instead of ratios.", rich_help_panel=panels.BUDGET
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for tables, plots and the journal.",
            rich_help_panel=panels.OUTPUT,
        ),
    ] = None,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            "--eval",
            metavar="SPEC",
            help="Text for perplexity, as for eval --data; repeatable.",
            rich_help_panel=panels.MEASURED,
        ),
    ] = None,
    window: Annotated[
        int, typer.Option(metavar="N", help="Tokens in one window of it.", rich_help_panel=panels.MEASURED)
    ] = 512,
    max_windows: Annotated[
        int | None, typer.Option(metavar="N", help="Score only the first windows.", rich_help_panel=panels.MEASURED)
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            autocompletion=completion.a_suite,
            help="Suite of lm-eval tasks to score too: a name from `sglp-llm ls suites`, or a file; repeatable.",
            rich_help_panel=panels.MEASURED,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="Score only the first examples of each task.", rich_help_panel=panels.MEASURED),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the files that the suite's tasks read.", rich_help_panel=panels.MEASURED
        ),
    ] = None,
    measure_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="What perplexity and tasks are computed in. Default: as --dtype.",
            rich_help_panel=panels.MEASURED,
        ),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep what is measured here, for other comparisons of the model too.",
            rich_help_panel=panels.MEASURED,
        ),
    ] = None,
    heal_recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            autocompletion=completion.a_healing_recipe,
            help="How +heal trains: YAML file, or a name from `sglp-llm ls healing-recipes`.",
            rich_help_panel=panels.REPAIR,
        ),
    ] = None,
    heal_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="1.6M", help="Training tokens of +heal, e.g. 1.6M. Default: 128k.", rich_help_panel=panels.REPAIR
        ),
    ] = None,
    recipe: RecipeName = None,
    option: Option = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS",
            help="Repeat all for these calibration seeds, such as 0,1,2: means and spreads.",
            rich_help_panel=panels.CALIBRATION,
        ),
    ] = None,
    trial_samples: TrialSamples = None,
    segments: Segments = None,
    kernel: Kernel = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    revision: Revision = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare methods on one model: each at every depth, measured in memory. Resumes an interrupted run."""
    settings = settings_of(locals())
    if output is None:
        raise UserError("where to? Give --output FOLDER")
    if not suite and (limit is not None or data_dir is not None):
        raise UserError("--limit and --data-dir are about tasks: give --suite too")
    if seeds is not None and seed is not None:
        raise UserError("give --seed or --seeds, not both")
    drawn = None if seeds is None else _seeds(seeds)
    console = prepare(quiet)
    from contextlib import ExitStack
    from dataclasses import asdict, replace

    from sglp_llm.analysis.opening import open_for_comparison, read_calibration
    from sglp_llm.calibration import named_text
    from sglp_llm.checkpoint.lock import LOCK_FILE_NAME, only_run
    from sglp_llm.cli.memory_table import text_line
    from sglp_llm.comparison.compare import MEASURED, check_compensations, checked_recipes, compare
    from sglp_llm.comparison.measured import Measuring
    from sglp_llm.comparison.measurements import perplexity_measurement, suite_measurements
    from sglp_llm.compensation import NONE
    from sglp_llm.report.comparison_tables import to_markdown, write_tables
    from sglp_llm.report.html import write_report
    from sglp_llm.report.plots import check_plotting, plot_perplexity
    from sglp_llm.report.seed_tables import seeds_to_markdown, spreads, write_seed_tables

    check_plotting()
    held = "journal" if drawn is None else "seed-*/journal"
    # What a run may have made before its journal, when it was interrupted that early.
    early = (LOCK_FILE_NAME, MEASURED)
    others = [each for each in output.glob("*") if each.name not in early and not each.name.startswith("seed-")]
    if others and not any(output.glob(held)):
        raise UserError(f"{output}: exists and holds no comparison; choose another folder")
    budgets = _budgets(ratios, drops)
    names = [name.strip() for name in criteria.split(",") if name.strip()]
    chosen = recipe_of(recipe, settings, model)
    said = text_line(chosen)
    chosen = chosen.with_changes(**budgets[0].to_dict(), calibration=named_text(chosen.calibration))
    recipes = checked_recipes(chosen, names, budgets)
    training = healing_recipe_of(heal_recipe, heal_tokens, None if heal_recipe else chosen.calibration)
    used = list(dict.fromkeys(each[0].criterion for each in recipes.values()))
    with only_run(output / LOCK_FILE_NAME, output), disk_of(output), ExitStack() as files:
        opened = open_for_comparison(model_of(model, chosen), replace(chosen, compensate=NONE), used)
        files.enter_context(opened.unchanged_files())
        check_compensations(recipes, opened, chosen.samples)
        if said is not None:
            say(said)
        texts = evaluate or ["wikitext2"]
        sets = [
            read_calibration(opened, replace(chosen, seed=each), progress=console.progress_bar)
            for each in drawn or [chosen.seed]
        ]
        measurements = [perplexity_measurement(opened, text, window, max_windows) for text in texts]
        measurements += suite_measurements(opened, suite or [], limit, data_dir)
        if measure_dtype is not None:
            measure_dtype = chosen.with_changes(dtype=measure_dtype).dtype
        measuring = Measuring(measurements, measured or output / MEASURED, measure_dtype)
        results = []
        for sequences in sets:
            folder = output if drawn is None else output / f"seed-{sequences.seed}"
            own = replace(chosen, seed=sequences.seed)
            results.append(
                compare(opened, sequences, own, names, budgets, measuring, folder, console.progress_bar, training)
            )
            write_tables(results[-1], folder)
            plot_perplexity(results[-1], folder)
            write_report(folder)
        if drawn is None:
            (result,) = results
            if as_json:
                console.print_json(asdict(result))
            else:
                print(to_markdown(result), end="")
            return
        found = spreads(results)
        write_seed_tables(found, drawn, output)
        if as_json:
            console.print_json(
                {"seeds": dict(zip(drawn, map(asdict, results), strict=True)), "spreads": list(map(asdict, found))}
            )
        else:
            print(seeds_to_markdown(found, drawn), end="")


def _seeds(given: str) -> list[int]:
    try:
        seeds = [int(number) for number in given.split(",")]
    except ValueError:
        raise UserError(f"--seeds {given!r} must be whole numbers separated by commas") from None
    if len(seeds) < 2 or len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds {given!r} must be at least two, each once: of one alone there is no spread (--seed)")
    return seeds


def _budgets(ratios: str | None, drops: str | None) -> list[Any]:
    from sglp_llm.records import Budget

    if ratios is not None and drops is not None:
        raise UserError("give --ratios or --drops, not both")
    try:
        if drops is not None:
            return [Budget(drop=int(number)) for number in drops.split(",")]
        return [Budget(ratio=float(number)) for number in (ratios or "0.1,0.2,0.3").split(",")]
    except ValueError:
        what, given = ("--ratios", ratios) if drops is None else ("--drops", drops)
        raise UserError(f"{what} {given!r} must be numbers separated by commas") from None
