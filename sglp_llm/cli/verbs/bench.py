"""``sglp-llm bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from sglp_llm.cli import panels
from sglp_llm.cli.options import DeviceMap, Json, Quiet, RequiredModel, Revision, recipe_of
from sglp_llm.cli.quiet import prepare


def bench(
    model: RequiredModel,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="OTHER",
            help="Measure this model too, in turns, and show the ratios.",
            rich_help_panel=panels.MEASURED,
        ),
    ] = None,
    prompt_len: Annotated[
        int, typer.Option(metavar="N", help="Tokens of a prompt.", rich_help_panel=panels.MEASURED)
    ] = 128,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens to generate after it.", rich_help_panel=panels.MEASURED)
    ] = 32,
    batch: Annotated[
        int,
        typer.Option(
            metavar="N", help="Sequences at once, beside the measurement with one.", rich_help_panel=panels.MEASURED
        ),
    ] = 8,
    warmup: Annotated[
        int,
        typer.Option(
            metavar="N", help="Rounds that are not timed; memory is measured in them.", rich_help_panel=panels.MEASURED
        ),
    ] = 1,
    repeats: Annotated[
        int, typer.Option(metavar="N", help="Rounds that are timed.", rich_help_panel=panels.MEASURED)
    ] = 5,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Of the random token ids of the prompts.", rich_help_panel=panels.MEASURED)
    ] = 0,
    revision: Revision = None,
    baseline_revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Hub branch, tag or commit of the baseline.", rich_help_panel=panels.MODEL),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="auto, bfloat16, float16 or float32.", rich_help_panel=panels.MEMORY)
    ] = "auto",
    device_map: DeviceMap = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Size, speed and memory of a model: counts, time to first token, tokens a second, peak memory."""
    console = prepare(quiet)
    from sglp_llm.cli import bench_table
    from sglp_llm.errors import UserError
    from sglp_llm.evaluation.benchmark import BenchmarkSettings, benchmark
    from sglp_llm.models.opened import OpenedModel

    settings = BenchmarkSettings(prompt_len, new_tokens, batch, warmup, repeats, seed)
    if baseline is None and baseline_revision is not None:
        raise UserError("--baseline-revision is about the baseline: give --baseline OTHER too")
    chosen = recipe_of(None, {"dtype": dtype, "revision": revision, "device_map": device_map})
    named = [(model, revision)] if baseline is None else [(baseline, baseline_revision), (model, revision)]
    opened_models = [OpenedModel(name, at, chosen.dtype, chosen.device_map) for name, at in named]
    measured = benchmark(opened_models, settings, console.progress_bar)
    if as_json:
        console.print_json(bench_table.to_dict(measured, settings))
    else:
        print("\n".join(bench_table.heading(measured, settings)))
        columns, rows = bench_table.table(measured)
        console.print_table("", columns, rows, range(1, len(columns)))
