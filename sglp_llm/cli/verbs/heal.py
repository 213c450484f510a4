"""``sglp-llm heal``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sglp_llm.cli import completion, panels
from sglp_llm.cli.options import Json, Overwrite, Private, PushToHub, Quiet, Scratch, healing_recipe_of, number_or_word
from sglp_llm.cli.pushing import check_push, push_finished
from sglp_llm.cli.quiet import prepare, say
from sglp_llm.errors import UserError

_SETTINGS = (
    "teacher distil train seam_layers seam_side last_layers lora_rank lora_alpha answers on_policy prompt_tokens shortest "
    "minutes epochs repeat held_out seq_len sequences batch_size alpha beta positions temperature hidden_weight top_k store "
    "learning_rate schedule final_rate warmup_steps weight_decay gradient_checkpointing patience least_gain dtype "
    "engine scratch seed"
)


def heal(
    model: Annotated[str, typer.Argument(metavar="PRUNED", help="Folder or Hub id of the shortened model.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write.", rich_help_panel=panels.OUTPUT),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            autocompletion=completion.a_healing_recipe,
            help="YAML file, or a name from `sglp-llm ls healing-recipes`.",
            rich_help_panel=panels.TRAINED,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL",
            help="The original model. Default: the one that the plan names.",
            rich_help_panel=panels.TEACHER,
        ),
    ] = None,
    distil: Annotated[
        bool | None,
        typer.Option(
            "--distil/--no-teacher",
            help="Learn the teacher's predictions, or the text alone.",
            rich_help_panel=panels.TEACHER,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Training text: as for --calibration, a mixture such as 'wikitext2:1 c4:1'; repeatable.",
            rich_help_panel=panels.TEXT,
        ),
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(
            metavar="WHOSE",
            help="teacher: the original answers the questions of alpaca or chat:FILE. Default: data, its own answers.",
            rich_help_panel=panels.TEXT,
        ),
    ] = None,
    on_policy: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the steps whose sequences the student continues itself. Default: 0.",
            rich_help_panel=panels.TEACHER,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens of a sequence that it continues. Default: 64.", rich_help_panel=panels.TEACHER
        ),
    ] = None,
    shortest: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens that it adds in the first step, more in later ones. Default: 16.",
            rich_help_panel=panels.TEACHER,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="1.6M", help="Training tokens, e.g. 1.6M. Default: 128k.", rich_help_panel=panels.TEXT),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="N", help="Wall time instead.", rich_help_panel=panels.TEXT)
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(metavar="N", help="Passes over all of the text instead.", rich_help_panel=panels.TEXT),
    ] = None,
    repeat: Annotated[
        bool | None,
        typer.Option(
            "--repeat/--no-repeat",
            help="See text again where there is less of it. Default: no.",
            rich_help_panel=panels.TEXT,
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="full, partial, seam (layers around the cuts), lora, or auto (default), see docs/heal.md.",
            rich_help_panel=panels.TRAINED,
        ),
    ] = None,
    seam_layers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Layers on each side of a cut. Default: 2.", rich_help_panel=panels.TRAINED),
    ] = None,
    seam_side: Annotated[
        str | None,
        typer.Option(
            metavar="SIDE",
            help="Only those before or behind the cuts, or both (default).",
            rich_help_panel=panels.TRAINED,
        ),
    ] = None,
    last_layers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Last layers that partial trains. Default: 3.", rich_help_panel=panels.TRAINED),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(metavar="N", help="Default: 16.", rich_help_panel=panels.TRAINED)
    ] = None,
    lora_alpha: Annotated[
        int | None, typer.Option(metavar="N", help="Default: 32.", rich_help_panel=panels.TRAINED)
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens in a sequence. Default: 512.", rich_help_panel=panels.TEXT)
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(metavar="N", help="Sequences of one optimizer step. Default: 4.", rich_help_panel=panels.STEPS),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Sequences computed at once by one process. Default: auto.",
            rich_help_panel=panels.MEMORY,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(metavar="RATE", help="Default: by --train.", rich_help_panel=panels.STEPS)
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="cosine (default), linear or constant.", rich_help_panel=panels.STEPS),
    ] = None,
    final_rate: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Share of the learning rate at the end. Default: 0.", rich_help_panel=panels.STEPS
        ),
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Default: 2.", rich_help_panel=panels.STEPS)
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(metavar="X", help="Default: 0.", rich_help_panel=panels.STEPS)
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Weight of the divergence; the next-token loss has the rest. Default: 1.",
            rich_help_panel=panels.TEACHER,
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Divergence: 0 (default) is KL from the teacher, 1 the reverse, 0.5 Jensen-Shannon.",
            rich_help_panel=panels.TEACHER,
        ),
    ] = None,
    hidden_weight: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Weight of the difference of hidden states behind the cuts. Default: 0.",
            rich_help_panel=panels.TEACHER,
        ),
    ] = None,
    positions: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the positions that a step computes losses at, drawn anew.",
            rich_help_panel=panels.TEACHER,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="X", help="Of both distributions. Default: 1.", rich_help_panel=panels.TEACHER),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="N", help="Use the teacher's most likely tokens only.", rich_help_panel=panels.TEACHER),
    ] = None,
    store: Annotated[
        bool | None,
        typer.Option(
            "--store-teacher/--online-teacher",
            help="Compute the teacher's top-k beforehand. Default: auto.",
            rich_help_panel=panels.TEACHER,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Of a stored teacher: resident, streamed or auto.", rich_help_panel=panels.MEMORY
        ),
    ] = None,
    scratch: Scratch = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Share of the text that only judges. Default: 0.05.", rich_help_panel=panels.TEXT
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Less memory, more time.", rich_help_panel=panels.MEMORY)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="auto, bfloat16 or float32: what is computed in.", rich_help_panel=panels.MEMORY
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="End when so many of the ten held-out measurements in a row were no gain.",
            rich_help_panel=panels.STEPS,
        ),
    ] = None,
    least_gain: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="By which the held-out loss must fall to be a gain. Default: 0.",
            rich_help_panel=panels.STEPS,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of everything that is drawn. Default: 0.", rich_help_panel=panels.STEPS),
    ] = None,
    keep_adapter: Annotated[
        bool, typer.Option(help="Write the LoRA adapter beside the merged weights.", rich_help_panel=panels.TRAINED)
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run.", rich_help_panel=panels.OUTPUT)] = False,
    report_to: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="wandb, tensorboard or trackio; repeatable.", rich_help_panel=panels.OUTPUT),
    ] = None,
    overwrite: Overwrite = False,
    verify: Annotated[
        bool,
        typer.Option(
            help="Reload the result and compare it with what was trained. Default: yes.", rich_help_panel=panels.OUTPUT
        ),
    ] = True,
    push_to_hub: PushToHub = None,
    private: Private = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a shortened model on the original's predictions, and write it."""
    arguments = dict(locals())
    if output is None:
        raise UserError("where to? Give --output FOLDER")
    console = prepare(quiet)
    from sglp_llm.cli.memory_table import MemoryLines
    from sglp_llm.healing.heal import heal
    from sglp_llm.processes.distributed import current_processes
    from sglp_llm.progress import silent

    processes = current_processes()
    with processes.failing_together():
        check_push(push_to_hub, private)
        settings: dict[str, Any] = {name: arguments[name] for name in _SETTINGS.split()}
        settings["batch_size"] = batch_size and number_or_word(batch_size)
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
        say(f"Stopped early: {report.record.stopped}")
    memory = MemoryLines()
    if as_json:
        console.print_json({**console.healing_to_dict(report), "memory": memory.to_dict()})
    else:
        console.print_healing(report)
        memory.print_peak()
    if push_to_hub is not None:
        push_finished(output, push_to_hub, private, as_json)
