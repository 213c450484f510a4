"""``sglp-llm bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from sglp_llm.cli.options import DeviceMap, Json, RequiredModel, Revision, recipe_of
from sglp_llm.cli.quiet import prepare
from sglp_llm.cli.recording import Record, folder_to_record


def bench(
    model: RequiredModel,
    baseline: Annotated[
        str | None, typer.Option(metavar="OTHER", help="Measure this model too, in turns, and show the ratios.")
    ] = None,
    prompt_len: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate after it.")] = 32,
    batch: Annotated[int, typer.Option(help="Sequences at once, beside the measurement with one.")] = 8,
    warmup: Annotated[int, typer.Option(help="Rounds that are not timed; memory is measured in them.")] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds that are timed.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the random token ids of the prompts.")] = 0,
    revision: Revision = None,
    baseline_revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit of the baseline.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device_map: DeviceMap = None,
    record: Record = False,
    as_json: Json = False,
) -> None:
    """Size, speed and memory of a model: counts, time to first token, tokens a second, peak memory."""
    console = prepare()
    from sglp_llm.cli import bench_table
    from sglp_llm.errors import UserError
    from sglp_llm.evaluation.benchmark import BenchmarkSettings, benchmark
    from sglp_llm.models.opened import OpenedModel

    settings = BenchmarkSettings(prompt_len, new_tokens, batch, warmup, repeats, seed)
    if baseline is None and baseline_revision is not None:
        raise UserError("--baseline-revision is about the baseline: give --baseline OTHER too")
    chosen = recipe_of(None, {"dtype": dtype, "revision": revision, "device_map": device_map})
    folder = folder_to_record(model) if record else None
    if baseline is None and folder is not None:
        baseline, baseline_revision = folder.original
    named = [(model, revision)] if baseline is None else [(baseline, baseline_revision), (model, revision)]
    opened_models = [OpenedModel(name, at, chosen.dtype, chosen.device_map) for name, at in named]
    if folder is not None:
        folder.check_original(opened_models[0])
    measured = benchmark(opened_models, settings, console.progress_bar)
    if folder is not None:
        folder.keep_speeds(measured[0], measured[1], settings)
    if as_json:
        console.print_json(bench_table.to_dict(measured, settings))
    else:
        print("\n".join(bench_table.heading(measured, settings)))
        columns, rows = bench_table.table(measured)
        console.print_table("", columns, rows, range(1, len(columns)))
