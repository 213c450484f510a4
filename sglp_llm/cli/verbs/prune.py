"""``sglp-llm prune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sglp_llm.cli import completion, panels
from sglp_llm.cli.options import (
    DECIDING,
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
    Private,
    ProtectFirst,
    ProtectLast,
    PushToHub,
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
    healing_settings,
    model_of,
    preset_of,
    recipe_of,
    settings_of,
)
from sglp_llm.cli.pushing import check_push, push_finished
from sglp_llm.cli.quiet import prepare
from sglp_llm.errors import UserError

if TYPE_CHECKING:
    from sglp_llm.processes import Processes


def prune(
    model: Model = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder to write, or a .gguf file where MODEL is one.",
            rich_help_panel=panels.OUTPUT,
        ),
    ] = None,
    recipe: RecipeName = None,
    preset: Preset = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|3,7,11",
            help="Remove these layers instead of analysing: sglp_plan.json, mergekit's YAML, or 0-based indices.",
            rich_help_panel=panels.METHOD,
        ),
    ] = None,
    merge_adapter: Annotated[
        Path | None,
        typer.Option(
            help="MODEL is a PEFT adapter: write it, merged into its base model, to this folder, and prune that.",
            rich_help_panel=panels.MODEL,
        ),
    ] = None,
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
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="2GB",
            help="Largest weight file, e.g. 2GB. Default: like the source.",
            rich_help_panel=panels.OUTPUT,
        ),
    ] = None,
    heal: Annotated[
        bool | None,
        typer.Option(
            "--heal/--no-heal",
            help="Train the result on the original's predictions, see heal.",
            rich_help_panel=panels.REPAIR,
        ),
    ] = None,
    heal_recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            autocompletion=completion.a_healing_recipe,
            help="YAML file, or a name from `sglp-llm ls healing-recipes`.",
            rich_help_panel=panels.REPAIR,
        ),
    ] = None,
    heal_tokens: Annotated[
        str | None,
        typer.Option(metavar="1.6M", help="Training tokens, e.g. 1.6M. Default: 128k.", rich_help_panel=panels.REPAIR),
    ] = None,
    overwrite: Overwrite = False,
    verify: Annotated[
        bool,
        typer.Option(
            help="Reload the result and compare it with the source. Default: yes.", rich_help_panel=panels.OUTPUT
        ),
    ] = True,
    push_to_hub: PushToHub = None,
    private: Private = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Remove layers and write a smaller checkpoint that plain from_pretrained loads."""
    settings = settings_of(locals())
    if output is None:
        raise UserError("where to? Give --output FOLDER")
    arguments = locals()
    if plan is not None and (given := [name for name in DECIDING if arguments[name] is not None]):
        raise UserError(f"--plan already says which layers go: leave out --{given[0].replace('_', '-')}")
    if heal is False and (heal_recipe is not None or heal_tokens is not None):
        raise UserError("--heal-recipe and --heal-tokens are about training: leave out --no-heal")
    if push_to_hub is not None and output.suffix == ".gguf":
        raise UserError("--push-to-hub uploads a folder, and the output is a GGUF file: upload it with `hf upload`")
    settings["heal"] = healing_settings(heal, heal_recipe, heal_tokens)
    console = prepare(quiet)
    from sglp_llm.checkpoint.gguf_file import check_shortened_output
    from sglp_llm.cli.memory_table import MemoryLines, price_line, text_line
    from sglp_llm.models.loading import find_tokenizer
    from sglp_llm.models.source import find_depth
    from sglp_llm.pipeline import prune
    from sglp_llm.plan.given import given_plan
    from sglp_llm.processes.distributed import current_processes
    from sglp_llm.progress import silent

    processes = current_processes()
    with processes.failing_together():
        check_push(push_to_hub, private)
        check_shortened_output(output, overwrite)
        taken = preset if plan is not None else preset_of(preset, recipe, settings, output)
        chosen = recipe_of(recipe, settings, model, taken)
        name = model_of(model, chosen)
        if merge_adapter is not None:
            name = _merged(name, merge_adapter, overwrite, processes)
        reader = None if tokenizer is None else find_tokenizer(tokenizer)
        known_plan = None if plan is None else given_plan(plan, lambda: find_depth(name, chosen.revision))
        # For the reload check alone any text serves, and this one needs no network.
        serves = plan is not None and recipe is None and calibration is None and chosen.healing is None
    progress = console.progress_bar if processes.is_main else silent
    memory = MemoryLines(*([] if as_json else [text_line(chosen), price_line(chosen)]))
    report = prune(
        name,
        output,
        plan=known_plan,
        recipe=chosen,
        tokenizer=reader,
        calibration="pydoc" if serves else None,
        overwrite=overwrite,
        verify=verify,
        progress=progress,
        on_forecast=memory.print_forecast if processes.is_main else None,
        processes=processes,
    )
    if not processes.is_main:
        return
    if as_json:
        console.print_json({**console.report_to_dict(report), "memory": memory.to_dict()})
    else:
        console.print_report(report)
        memory.print_peak()
    if push_to_hub is not None:
        push_finished(output, push_to_hub, private, as_json)


def _merged(adapter: str, output: Path, overwrite: bool, processes: Processes) -> str:
    from sglp_llm.healing.merging import merge_adapter

    if processes.is_main:
        merge_adapter(adapter, output, overwrite)
    processes.wait()
    return str(output)
