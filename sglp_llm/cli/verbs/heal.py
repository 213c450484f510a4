"""``sglp-llm heal``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sglp_llm.cli.options import Json, Private, PushToHub, Scratch, healing_recipe_of
from sglp_llm.cli.pushing import check_push, push_finished
from sglp_llm.cli.quiet import prepare
from sglp_llm.errors import UserError

_SETTINGS = (
    "teacher distil train seam_layers seam_side last_layers lora_rank lora_alpha answers on_policy prompt_tokens shortest "
    "minutes epochs repeat held_out seq_len sequences batch_size alpha beta positions temperature hidden_weight top_k store "
    "learning_rate schedule final_rate warmup_steps weight_decay gradient_checkpointing dtype engine scratch seed"
)


def heal(
    model: Annotated[str, typer.Argument(metavar="PRUNED", help="Folder or Hub id of the shortened model.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    recipe: Annotated[str | None, typer.Option(help="YAML file, or a name from `sglp-llm ls healing-recipes`.")] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="ORIGINAL", help="The original model. Default: the one that the plan names.")
    ] = None,
    distil: Annotated[
        bool | None, typer.Option("--distil/--no-teacher", help="Learn the teacher's predictions, or the text alone.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Training text: as for --calibration, a mixture such as 'wikitext2:1 c4:1'; repeatable."),
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(
            help="teacher: the original answers the questions of alpaca or chat:FILE. Default: data, its own answers."
        ),
    ] = None,
    on_policy: Annotated[
        float | None, typer.Option(help="Share of the steps whose sequences the student continues itself. Default: 0.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a sequence that it continues. Default: 64.")
    ] = None,
    shortest: Annotated[
        int | None, typer.Option(help="Tokens that it adds in the first step, more in later ones. Default: 16.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens, e.g. 1.6M. Default: 128k.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Wall time instead.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over all of the text instead.")] = None,
    repeat: Annotated[
        bool | None, typer.Option("--repeat/--no-repeat", help="See text again where there is less of it. Default: no.")
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="full, partial, seam (layers around the cuts), lora, or auto (default), see docs/heal.md."),
    ] = None,
    seam_layers: Annotated[int | None, typer.Option(help="Layers on each side of a cut. Default: 2.")] = None,
    seam_side: Annotated[
        str | None, typer.Option(help="Only those before or behind the cuts, or both (default).")
    ] = None,
    last_layers: Annotated[int | None, typer.Option(help="Last layers that partial trains. Default: 3.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Default: 16.")] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="Default: 32.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a sequence. Default: 512.")] = None,
    sequences: Annotated[int | None, typer.Option(help="Sequences of one optimizer step. Default: 4.")] = None,
    batch_size: Annotated[
        str | None, typer.Option(metavar="N|auto", help="Sequences computed at once by one process. Default: auto.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: by --train.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine (default), linear or constant.")] = None,
    final_rate: Annotated[float | None, typer.Option(help="Share of the learning rate at the end. Default: 0.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Default: 2.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: 0.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Weight of the divergence; the next-token loss has the rest. Default: 1.")
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(help="Divergence: 0 (default) is KL from the teacher, 1 the reverse, 0.5 Jensen-Shannon."),
    ] = None,
    hidden_weight: Annotated[
        float | None, typer.Option(help="Weight of the difference of hidden states behind the cuts. Default: 0.")
    ] = None,
    positions: Annotated[
        float | None, typer.Option(help="Share of the positions that a step computes losses at, drawn anew.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of both distributions. Default: 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Use the teacher's most likely tokens only.")] = None,
    store: Annotated[
        bool | None,
        typer.Option("--store-teacher/--online-teacher", help="Compute the teacher's top-k beforehand. Default: auto."),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Of a stored teacher: resident, streamed or auto.")] = None,
    scratch: Scratch = None,
    held_out: Annotated[float | None, typer.Option(help="Share of the text that only judges. Default: 0.05.")] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help="Less memory, more time.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32: what is computed in.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is drawn. Default: 0.")] = None,
    keep_adapter: Annotated[bool, typer.Option(help="Write the LoRA adapter beside the merged weights.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run.")] = False,
    report_to: Annotated[list[str] | None, typer.Option(help="wandb, tensorboard or trackio; repeatable.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if it exists.")] = False,
    verify: Annotated[bool, typer.Option(help="Reload the result and compare it with what was trained.")] = True,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Train a shortened model on the original's predictions, and write it."""
    arguments = dict(locals())
    if output is None:
        raise UserError("where to? Give --output FOLDER")
    console = prepare()
    from sglp_llm.cli.memory_table import MemoryLines
    from sglp_llm.healing.heal import heal
    from sglp_llm.processes.distributed import current_processes
    from sglp_llm.progress import silent

    processes = current_processes()
    with processes.failing_together():
        check_push(push_to_hub, private)
        settings: dict[str, Any] = {name: arguments[name] for name in _SETTINGS.split()}
        if batch_size is not None and batch_size.isdecimal():
            settings["batch_size"] = int(batch_size)
        chosen = healing_recipe_of(recipe, tokens, " ".join(data) if data else None, settings)
    report = heal(
        model,
        output,
        recipe=chosen,
        overwrite=overwrite,
        verify=verify,
        keep_adapter=keep_adapter,
        resume=resume,
        report_to=tuple(report_to or ()),
        progress=console.progress_bar if processes.is_main else silent,
        processes=processes,
    )
    if not processes.is_main:
        return
    if report.record.stopped is not None:
        print(f"Stopped early: {report.record.stopped}", file=sys.stderr)
    memory = MemoryLines()
    if as_json:
        console.print_json({**console.healing_to_dict(report), "memory": memory.to_dict()})
    else:
        console.print_healing(report)
        memory.print_peak()
    if push_to_hub is not None:
        push_finished(output, push_to_hub, private, as_json)
