"""The options that the verbs share, and how they become a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from sglp_llm.cli import completion, panels
from sglp_llm.errors import UserError

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Hub id, local folder, or PATH.gguf. May stand in the recipe instead."),
]
RequiredModel = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, or PATH.gguf.")]
Revision = Annotated[
    str | None, typer.Option(metavar="NAME", help="Hub branch, tag or commit.", rich_help_panel=panels.MODEL)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="auto, bfloat16, float16 or float32: what is computed in.",
        autocompletion=completion.one_of(("auto", "bfloat16", "float16", "float32")),
        rich_help_panel=panels.MEMORY,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="PLACE",
        help="accelerate's placement, such as auto. Default: one device.",
        rich_help_panel=panels.MEMORY,
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="YAML file, or a name from `sglp-llm ls recipes`.",
        autocompletion=completion.a_recipe,
        rich_help_panel=panels.METHOD,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How layers are chosen and repaired: see `sglp-llm ls presets`. Single options change it. "
        "Default: fast, unless there is a recipe, a criterion or a compensation.",
        autocompletion=completion.a_preset,
        rich_help_panel=panels.METHOD,
    ),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", help="Share of the decoder layers to remove, in (0, 1).", rich_help_panel=panels.BUDGET
    ),
]
Drop = Annotated[
    int | None, typer.Option(metavar="N", help="Number of decoder layers to remove.", rich_help_panel=panels.BUDGET)
]
TargetParams = Annotated[
    str | None,
    typer.Option(
        metavar="6.5B",
        help="Remove the fewest layers that leave at most this many, e.g. 6.5B.",
        rich_help_panel=panels.BUDGET,
    ),
]
TargetMemory = Annotated[
    str | None,
    typer.Option(
        metavar="6GB",
        help="Remove the fewest layers until weights and KV cache of one sequence fit into this, e.g. 6GB.",
        rich_help_panel=panels.BUDGET,
    ),
]
TargetLatency = Annotated[
    str | None,
    typer.Option(
        metavar="0.8x|25ms",
        help="Remove the fewest layers until decoding a token takes this share of the whole model's time, or this time.",
        rich_help_panel=panels.BUDGET,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens in the KV cache of --target-memory. Default: the model's longest context, 4096 at most.",
        rich_help_panel=panels.BUDGET,
    ),
]
CriterionName = Annotated[
    str | None,
    typer.Option(
        "--criterion",
        metavar="NAME",
        help="sglp, or a name from `sglp-llm ls criteria`.",
        autocompletion=completion.a_criterion,
        rich_help_panel=panels.METHOD,
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Score by this criterion too, in the same pass; repeatable.",
        autocompletion=completion.a_criterion,
        rich_help_panel=panels.METHOD,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="wikitext2, wikitext103, c4, fineweb-edu, alpaca, bookcorpus, pydoc, text:FILE, jsonl:FILE:FIELD, "
        "chat:FILE (files plain or .gz), self (written by the model), or several with weights: 'wikitext2:1 self:2'. "
        "Default: wikitext2 and c4, or self where the Hub cannot be read.",
        rich_help_panel=panels.CALIBRATION,
    ),
]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="NAME",
        help="Folder or Hub id of another tokenizer to read text with. Default: the model's own.",
        rich_help_panel=panels.CALIBRATION,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(metavar="N", help="Calibration sequences. Default: 32.", rich_help_panel=panels.CALIBRATION),
]
SeqLen = Annotated[
    int | None, typer.Option(metavar="N", help="Tokens in each. Default: 512.", rich_help_panel=panels.CALIBRATION)
]
Seed = Annotated[
    int | None,
    typer.Option(metavar="N", help="Of everything that is drawn. Default: 0.", rich_help_panel=panels.CALIBRATION),
]
TrialSamples = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Sequences that ppl, sleb, kl, cka_output and search try removals on. Default: all.",
        rich_help_panel=panels.SEARCH,
    ),
]
SearchBudget = Annotated[
    str | None,
    typer.Option(
        metavar="16k|5m",
        help="Tokens, or time, that the criterion search tries removals for.",
        rich_help_panel=panels.SEARCH,
    ),
]
JournalDir = Annotated[
    str | None,
    typer.Option(
        "--journal",
        metavar="DIR",
        help="Where search keeps its trials, to go on from when interrupted.",
        rich_help_panel=panels.SEARCH,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Sequences that are computed at once, where they fit. Default: 8.",
        rich_help_panel=panels.MEMORY,
    ),
]
OnDevice = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="GPU",
        help="Also predict the time on this GPU: a100, h100, h200, l4, l40s, rtx4090.",
        rich_help_panel=panels.MEMORY,
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="resident: the whole model in memory; streamed: layer by layer; auto (default): what fits.",
        autocompletion=completion.one_of(("auto", "resident", "streamed")),
        rich_help_panel=panels.MEMORY,
    ),
]
Scratch = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Where the streamed engine stores hidden states. Default: in memory.",
        rich_help_panel=panels.MEMORY,
    ),
]
Segments = Annotated[
    bool | None,
    typer.Option(
        "--segments/--no-segments",
        help="Compare scores inside CKA segments. Default: sglp does.",
        rich_help_panel=panels.SEGMENTS,
    ),
]
NumSegments = Annotated[
    str | None,
    typer.Option(metavar="N|auto", help="Number of CKA segments, or auto (default).", rich_help_panel=panels.SEGMENTS),
]
SegmentsRule = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How that number is found: auto (default), or paper, as the paper's published code does.",
        rich_help_panel=panels.SEGMENTS,
    ),
]
Features = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What segments are computed from: column_sum (default) or rows of the CKA matrix.",
        rich_help_panel=panels.SEGMENTS,
    ),
]
MinDrop = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="No more segments where one more lowers the Fisher loss by less than this share. Default: 0.05.",
        rich_help_panel=panels.SEGMENTS,
    ),
]
Option = Annotated[
    list[str] | None,
    typer.Option(
        metavar="C.KEY=VALUE",
        help="CRITERION.KEY=VALUE, such as angular.tokens=all; repeatable.",
        rich_help_panel=panels.METHOD,
    ),
]
Kernel = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="CKA kernel: cosine (default) or linear (the paper's).",
        autocompletion=completion.one_of(("cosine", "linear")),
        rich_help_panel=panels.SEGMENTS,
    ),
]
ProtectFirst = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Layers at the front that are never removed. Default: 0.", rich_help_panel=panels.BUDGET
    ),
]
ProtectLast = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Layers at the end that are never removed. Default: 0.", rich_help_panel=panels.BUDGET
    ),
]
Compensate = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Fold what the removed layers did into weights that are kept: none, scale, linear, refit, auto or learned.",
        autocompletion=completion.a_compensation,
        rich_help_panel=panels.REPAIR,
    ),
]
PushToHub = Annotated[
    str | None, typer.Option(metavar="REPO", help="Upload the finished folder to the Hub.", rich_help_panel=panels.HUB)
]
Private = Annotated[bool, typer.Option(help="Create the Hub repository private.", rich_help_panel=panels.HUB)]
Overwrite = Annotated[bool, typer.Option(help="Replace the output folder if it exists.", rich_help_panel=panels.OUTPUT)]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="No progress and no forecasts: results on stdout, errors on stderr.",
        rich_help_panel=panels.OUTPUT,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of text.", rich_help_panel=panels.OUTPUT)
]

DECIDING = [
    "preset",
    "ratio",
    "drop",
    "target_params",
    "target_memory",
    "target_latency",
    "context",
    "criterion",
    "also",
    "option",
    "search_budget",
    "journal",
    "segments",
    "num_segments",
    "segments_rule",
    "features",
    "min_drop",
    "kernel",
    "protect_first",
    "protect_last",
    "compensate",
]
"""Options that decide which layers are removed."""


def settings_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options of a verb that are settings of the recipe, by the recipe's names."""
    from sglp_llm.sizes import parse_count

    names = (
        "ratio drop target_memory target_latency context criterion also segments segments_rule features min_drop kernel "
        "calibration samples seq_len seed trial_samples journal batch_size engine scratch compensate revision dtype "
        "device_map max_shard_size"
    )
    settings = {name: arguments.get(name) for name in names.split()}
    settings["also"] = settings["also"] or None
    if (target := arguments.get("target_params")) is not None:
        target = parse_count(target)
    number = arguments.get("num_segments")
    options = _options(arguments.get("option") or [])
    if (budget := arguments.get("search_budget")) is not None:
        options["search"] = {**options.get("search", {}), "budget": budget}
    protect = {"first": arguments.get("protect_first"), "last": arguments.get("protect_last")}
    return {
        **settings,
        "target_params": target,
        "num_segments": int(number) if number is not None and re.fullmatch("-?[0-9]{1,18}", number) else number,
        "options": options or None,
        "protect": {end: number for end, number in protect.items() if number is not None} or None,
    }


def _options(given: list[str]) -> dict[str, dict[str, Any]]:
    options: dict[str, dict[str, Any]] = {}
    for text in given:
        match = re.fullmatch(r"(\w+)\.(\w+)=(.+)", text)
        if match is None:
            raise UserError(f"--option {text!r} is not of the form CRITERION.KEY=VALUE")
        name, key, value = match.groups()
        options.setdefault(name, {})[key] = number_or_word(value)
    return options


def number_or_word(text: str) -> int | float | str:
    """The text as a number where it is one of no more digits than anything has."""
    if re.fullmatch("-?[0-9]{1,18}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?[0-9]{1,18}\.[0-9]{1,18}", text) else text


def recipe_of(name: str | None, settings: dict[str, Any], model: str | None = None, preset: str | None = None) -> Any:
    """The named recipe, or the defaults, overridden by the preset and then by the given settings.

    `preset_of` says which preset a verb takes where none is given.

    Args:
        name: A YAML file, or the name of a recipe that comes with the package.
        settings: As from `settings_of`.
        model: The model given on the command line.
        preset: Name of a preset.

    Raises:
        UserError: There is no such recipe or preset, or a setting has the wrong type.
    """
    from dataclasses import replace

    from sglp_llm.plan import Recipe, load_recipe, preset_settings

    recipe = Recipe() if name is None else load_recipe(name)
    if model is not None and model != recipe.model:
        recipe = replace(recipe, model=None, revision=None)  # the revision is that of the recipe's own model
    return recipe.with_changes(**preset_settings(preset)).with_changes(**settings)


def preset_of(
    preset: str | None, recipe: str | None, settings: dict[str, Any], output: Path | None = None
) -> str | None:
    """The given preset, or the default one for the output where nothing else says how layers are chosen."""
    from sglp_llm.plan import preset_or_default
    from sglp_llm.plan.shipped import DEFAULT_PRESET, UNCHANGED_PRESET

    default = UNCHANGED_PRESET if output is not None and output.suffix == ".gguf" else DEFAULT_PRESET
    return preset if recipe is not None else preset_or_default(preset, settings, default)


def model_of(model: str | None, recipe: Any) -> str:
    """The given model, or the recipe's.

    Raises:
        UserError: Neither names one.
    """
    name = recipe.model if model is None else model
    if not name:
        raise UserError("which model? Give MODEL (Hub id, folder or .gguf file), or a recipe that names one")
    return str(name)


def healing_settings(heal: bool | None, name: str | None, tokens: str | None) -> Any:
    """What ``--heal``, ``--heal-recipe`` and ``--heal-tokens`` set in the recipe; ``None`` where none is given.

    ``False`` is for ``--no-heal``, which neither of the others goes with.

    Raises:
        UserError: There is no such recipe, or a setting is wrong.
    """
    if name is None and tokens is None:
        return heal
    from sglp_llm.plan.healing_recipe import SHARED, HealingRecipe, healing_changes
    from sglp_llm.sizes import parse_count

    own = {} if name is None else healing_recipe_of(name, None, None).to_dict()
    default = HealingRecipe().to_dict()
    own = {key: value for key, value in own.items() if key not in SHARED or value != default.get(key)}
    return healing_changes(own, {} if tokens is None else {"tokens": parse_count(tokens)})


def healing_recipe_of(
    name: str | None, tokens: str | None, data: str | None, settings: dict[str, Any] | None = None
) -> Any:
    """The healing recipe of that name, or the defaults, with the options that more than one verb has.

    Args:
        name: A YAML file, or the name of a healing recipe that comes with the package.
        tokens: Number of training tokens, as ``1.6M``.
        data: Training text; ``None`` means the recipe's own.
        settings: Further settings; those that are None were not given.

    Raises:
        UserError: There is no such recipe, or a setting is wrong.
    """
    from sglp_llm.plan.healing_recipe import HealingRecipe, load_healing_recipe
    from sglp_llm.sizes import parse_count

    recipe = HealingRecipe() if name is None else load_healing_recipe(name)
    return recipe.with_changes(tokens=None if tokens is None else parse_count(tokens), data=data, **(settings or {}))
