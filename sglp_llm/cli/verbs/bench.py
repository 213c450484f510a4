"""``sglp-llm bench``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sglp_llm.cli import panels
from sglp_llm.cli.options import DeviceMap, Json, Quiet, RequiredModel, Revision, recipe_of
from sglp_llm.cli.quiet import prepare
from sglp_llm.cli.recording import Record, folder_to_record

if TYPE_CHECKING:
    from sglp_llm.evaluation.benchmark import BenchmarkSettings
    from sglp_llm.models.opened import OpenedModel


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
    draft_for: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL",
            help="Let MODEL draft for this model: acceptance length and speed-up.",
            rich_help_panel=panels.DRAFT,
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens that MODEL proposes a step. Default: 5.", rich_help_panel=panels.DRAFT),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(metavar="N", help="Number of prompts. Default: 4.", rich_help_panel=panels.DRAFT)
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Text of the prompts, as for --calibration. Default: pydoc.",
            rich_help_panel=panels.DRAFT,
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
        typer.Option(
            metavar="NAME",
            help="Hub branch, tag or commit of the baseline, or of the original.",
            rich_help_panel=panels.MODEL,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="auto, bfloat16, float16 or float32.", rich_help_panel=panels.MEMORY)
    ] = "auto",
    device_map: DeviceMap = None,
    record: Record = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Size, speed and memory of a model: counts, time to first token, tokens a second, peak memory.

    With --draft-for: what the model gains as the draft model of its original.
    """
    console = prepare(quiet)
    from sglp_llm.cli import bench_table
    from sglp_llm.errors import UserError
    from sglp_llm.evaluation.benchmark import BenchmarkSettings, benchmark
    from sglp_llm.models.opened import OpenedModel

    settings = BenchmarkSettings(prompt_len, new_tokens, batch, warmup, repeats, seed)
    other = baseline if draft_for is None else draft_for
    if baseline is not None and draft_for is not None:
        raise UserError("--baseline and --draft-for are two measurements: give one of them")
    if record and draft_for is not None:
        raise UserError("--record keeps speed and memory: leave out --draft-for")
    if other is None and baseline_revision is not None:
        raise UserError("--baseline-revision is about the baseline: give --baseline OTHER too")
    given = {"--draft-tokens": draft_tokens, "--prompts": prompts, "--text": text}
    if draft_for is None and (alone := [name for name, value in given.items() if value is not None]):
        raise UserError(f"{alone[0]} is about a draft model: give --draft-for ORIGINAL too")
    chosen = recipe_of(None, {"dtype": dtype, "revision": revision, "device_map": device_map})
    folder = folder_to_record(model) if record else None
    if other is None and folder is not None:
        other, baseline_revision = folder.original
    named = [(model, revision)] if other is None else [(other, baseline_revision), (model, revision)]
    opened_models = [OpenedModel(name, at, chosen.dtype, chosen.device_map) for name, at in named]
    if folder is not None:
        folder.check_original(opened_models[0])
    if draft_for is not None:
        tokens, count = (default if value is None else value for value, default in ((draft_tokens, 5), (prompts, 4)))
        _draft(opened_models, settings, tokens, count, text or "pydoc", as_json)
        return
    measured = benchmark(opened_models, settings, console.progress_bar)
    if folder is not None:
        folder.keep_speeds(measured[0], measured[1], settings)
    if as_json:
        console.print_json(bench_table.to_dict(measured, settings))
    else:
        print("\n".join(bench_table.heading(measured, settings)))
        columns, rows = bench_table.table(measured)
        console.print_table("", columns, rows, range(1, len(columns)))


def _draft(
    pair: list[OpenedModel], settings: BenchmarkSettings, draft_tokens: int, prompts: int, text: str, as_json: bool
) -> None:
    """Measures the second model as the draft model of the first."""
    console = prepare()
    from sglp_llm.calibration import calibration_set, named_text
    from sglp_llm.cli import draft_lines
    from sglp_llm.evaluation.drafting import DraftSettings, check_pair, measure_drafting

    original, draft = pair
    drafting = DraftSettings(settings.new_tokens, draft_tokens, settings.warmup, settings.repeats)
    check_pair(original, draft, settings.prompt_len + settings.new_tokens)
    source = named_text(text)
    sequences = calibration_set(
        original.tokenizer, source, samples=prompts, seq_len=settings.prompt_len, seed=settings.seed
    )
    original.check_tokens(sequences.input_ids)
    found = measure_drafting(original, draft, sequences.input_ids, drafting, console.progress_bar)
    if as_json:
        console.print_json(draft_lines.to_dict(found, drafting, sequences.source))
    else:
        print("\n".join(draft_lines.lines(found, drafting, sequences.source)))
