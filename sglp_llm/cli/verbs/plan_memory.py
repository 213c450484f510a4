"""``sglp-llm plan-memory``."""

from __future__ import annotations

from sglp_llm.cli.options import (
    Also,
    BatchSize,
    Compensate,
    CriterionName,
    DeviceMap,
    Dtype,
    Json,
    Model,
    OnDevice,
    Option,
    Preset,
    Quiet,
    RecipeName,
    Revision,
    Samples,
    Scratch,
    Segments,
    SeqLen,
    TrialSamples,
    model_of,
    preset_of,
    recipe_of,
    settings_of,
)
from sglp_llm.cli.quiet import prepare


def plan_memory(
    model: Model = None,
    recipe: RecipeName = None,
    preset: Preset = None,
    criterion: CriterionName = None,
    also: Also = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    trial_samples: TrialSamples = None,
    batch_size: BatchSize = None,
    option: Option = None,
    segments: Segments = None,
    compensate: Compensate = None,
    scratch: Scratch = None,
    revision: Revision = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    on: OnDevice = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Predict the memory that an analysis takes, with either engine. Needs the configuration, no weights."""
    settings = {name: value for name, value in settings_of(locals()).items() if name != "on"}
    console = prepare(quiet)
    from sglp_llm.analysis.observing import check_criteria
    from sglp_llm.cli import memory_table
    from sglp_llm.memory.duration import Duration, accelerator, predict_durations
    from sglp_llm.memory.peaks import choose_engine
    from sglp_llm.memory.prediction import computed_in, free_for, predict_memory, work_of
    from sglp_llm.models import find_config

    chosen = recipe_of(recipe, settings, model, preset_of(preset, recipe, settings))
    check_criteria(chosen)
    device = None if on is None else accelerator(on)
    name = model_of(model, chosen)
    config, gguf = find_config(name, chosen.revision)
    plan = predict_memory(config, chosen, gguf)
    free = free_for(chosen)
    engine = choose_engine(plan, free)
    durations: tuple[Duration, ...] = ()
    if device is not None:
        durations = predict_durations(config, computed_in(config, chosen, gguf), chosen, work_of(chosen), device)
    if as_json:
        console.print_json(memory_table.to_dict(plan, free, engine, durations))
        return
    columns, rows = memory_table.table(plan, free)
    console.print_table(memory_table.title(name, config, chosen, gguf), columns, rows, range(1, len(columns)))
    print(memory_table.advice(plan, free, engine))
    for duration in durations:
        print(memory_table.time_line(str(on), duration))
