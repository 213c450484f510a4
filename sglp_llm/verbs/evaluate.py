"""``sglp-llm eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from sglp_llm.verbs.options import DeviceMap, Json, RequiredModel, Revision, recipe_of
from sglp_llm.verbs.quiet import prepare


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
    console = prepare()
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
