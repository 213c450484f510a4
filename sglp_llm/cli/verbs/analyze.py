"""``sglp-llm analyze``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from sglp_llm.cli import panels
from sglp_llm.cli.options import (
    Also,
    BatchSize,
    Calibration,
    Compensate,
    Context,
    CriterionName,
    DeviceMap,
    Drop,
    Dtype,
    Engine,
    Features,
    JournalDir,
    Json,
    Kernel,
    MinDrop,
    Model,
    NumSegments,
    Option,
    Overwrite,
    Preset,
    ProtectFirst,
    ProtectLast,
    Quiet,
    Ratio,
    RecipeName,
    Revision,
    Samples,
    Scratch,
    SearchBudget,
    Seed,
    Segments,
    SegmentsRule,
    SeqLen,
    TargetLatency,
    TargetMemory,
    TargetParams,
    TokenizerName,
    TrialSamples,
    model_of,
    preset_of,
    recipe_of,
    settings_of,
)
from sglp_llm.cli.quiet import prepare


def analyze(
    model: Model = None,
    recipe: RecipeName = None,
    preset: Preset = None,
    ratio: Ratio = None,
    drop: Drop = None,
    target_params: TargetParams = None,
    target_memory: TargetMemory = None,
    target_latency: TargetLatency = None,
    context: Context = None,
    criterion: CriterionName = None,
    also: Also = None,
    calibration: Calibration = None,
    tokenizer: TokenizerName = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    trial_samples: TrialSamples = None,
    search_budget: SearchBudget = None,
    journal: JournalDir = None,
    batch_size: BatchSize = None,
    engine: Engine = None,
    scratch: Scratch = None,
    option: Option = None,
    segments: Segments = None,
    num_segments: NumSegments = None,
    segments_rule: SegmentsRule = None,
    features: Features = None,
    min_drop: MinDrop = None,
    kernel: Kernel = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    compensate: Compensate = None,
    revision: Revision = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for sglp_plan.json and report.html.",
            rich_help_panel=panels.OUTPUT,
        ),
    ] = None,
    overwrite: Overwrite = False,
    draw: Annotated[
        bool | None,
        typer.Option(
            "--draw/--no-draw",
            help="Draw the CKA matrix and its segments. Default: where stdout is a terminal.",
            rich_help_panel=panels.OUTPUT,
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decide which layers to remove and show why. Writes nothing without --output. Default budget: a quarter."""
    settings = settings_of(locals())
    console = prepare(quiet)
    from sglp_llm.calibration import named_text
    from sglp_llm.checkpoint import atomic_folder, check_output
    from sglp_llm.checkpoint.lock import lock_beside, only_run
    from sglp_llm.cli.memory_table import MemoryLines, price_line, text_line
    from sglp_llm.models import find_source
    from sglp_llm.models.loading import find_tokenizer
    from sglp_llm.pipeline import analyze
    from sglp_llm.plan import PLAN_FILE_NAME, RECIPE_FILE_NAME, save_plan, save_recipe
    from sglp_llm.processes.distributed import current_processes
    from sglp_llm.progress import silent
    from sglp_llm.report.html import write_report
    from sglp_llm.report.plots import can_plot, plot_plan

    processes = current_processes()
    with ExitStack() as held:
        with processes.failing_together():
            chosen = recipe_of(recipe, settings, model, preset_of(preset, recipe, settings))
            reader = None if tokenizer is None else find_tokenizer(tokenizer)
            if output is not None:
                check_output(output, overwrite)
                find_source(model_of(model, chosen), chosen.revision).check_apart(output)
                if processes.is_main:
                    held.enter_context(only_run(lock_beside(output), output))
        memory = MemoryLines(*([] if as_json else [text_line(chosen), price_line(chosen.with_changes(heal=False))]))
        analysis = analyze(
            model_of(model, chosen),
            recipe=chosen,
            tokenizer=reader,
            progress=console.progress_bar if processes.is_main else silent,
            on_forecast=memory.print_forecast if processes.is_main else None,
            processes=processes,
        )
        if not processes.is_main:
            return
        if output is not None:
            with atomic_folder(output, overwrite) as folder:
                save_plan(analysis.plan, folder / PLAN_FILE_NAME)
                used = {"model": model_of(model, chosen), "calibration": named_text(chosen.calibration)}
                save_recipe(chosen.with_changes(**used), folder / RECIPE_FILE_NAME)
                write_report(folder)
                if can_plot():
                    plot_plan(analysis.plan, folder)
    if as_json:
        console.print_json({**console.analysis_to_dict(analysis), "memory": memory.to_dict()})
    else:
        console.print_analysis(analysis, draw)
        memory.print_peak()
