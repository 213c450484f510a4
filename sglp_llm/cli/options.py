"""The options that the verbs share, and how they become a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from sglp_llm.errors import UserError

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Hub id, local folder, or PATH.gguf. May stand in the recipe instead."),
]
RequiredModel = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, or PATH.gguf.")]
Revision = Annotated[str | None, typer.Option(help="Hub branch, tag or commit.")]
Dtype = Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32: what is computed in.")]
DeviceMap = Annotated[str | None, typer.Option(help="accelerate's placement, such as auto. Default: one device.")]
RecipeName = Annotated[str | None, typer.Option("--recipe", help="YAML file, or a name from `sglp-llm ls recipes`.")]
Preset = Annotated[
    str | None,
    typer.Option(
        help="How layers are chosen and repaired, from `sglp-llm ls presets`; changes the recipe, other options change it. "
        "Default: fast, unless there is a recipe, a criterion or a compensation."
    ),
]
Ratio = Annotated[float | None, typer.Option(help="Share of the decoder layers to remove, in (0, 1).")]
Drop = Annotated[int | None, typer.Option(help="Number of decoder layers to remove.")]
TargetParams = Annotated[
    str | None, typer.Option(help="Remove the fewest layers that leave at most this many, e.g. 6.5B.")
]
TargetMemory = Annotated[
    str | None,
    typer.Option(help="Remove the fewest layers until weights and KV cache of one sequence fit into this, e.g. 6GB."),
]
TargetLatency = Annotated[
    str | None,
    typer.Option(
        metavar="0.8x|25ms",
        help="Remove the fewest layers until decoding a token takes this share of the whole model's time, or this time.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(help="Tokens in the KV cache of --target-memory. Default: the model's longest context, 4096 at most."),
]
CriterionName = Annotated[str | None, typer.Option("--criterion", help="sglp, or a name from `sglp-llm ls criteria`.")]
Also = Annotated[list[str] | None, typer.Option(help="Score by this criterion too, in the same pass; repeatable.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="wikitext2, wikitext103, c4, fineweb-edu, alpaca, bookcorpus, pydoc, text:FILE, jsonl:FILE:field, "
        "chat:FILE (files plain or .gz), self (sampled from the model), or several with weights: 'wikitext2:1 self:2'. "
        "Default: wikitext2 and c4, or self where the Hub cannot be read."
    ),
]
Samples = Annotated[int | None, typer.Option(help="Calibration sequences. Default: 32.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens in each. Default: 512.")]
Seed = Annotated[int | None, typer.Option(help="Of everything that is drawn. Default: 0.")]
TrialSamples = Annotated[
    int | None, typer.Option(help="Sequences that ppl, sleb, kl, cka_output and search try removals on. Default: all.")
]
SearchBudget = Annotated[
    str | None,
    typer.Option(metavar="16k|5m", help="Tokens, or time, that the criterion search tries removals for."),
]
JournalDir = Annotated[
    str | None,
    typer.Option("--journal", metavar="DIR", help="Where search keeps its trials, to go on from when interrupted."),
]
BatchSize = Annotated[int | None, typer.Option(help="Sequences that are computed at once, where they fit. Default: 8.")]
OnDevice = Annotated[
    str | None, typer.Option("--on", help="Also predict the time on this GPU: a100, h100, h200, l4, l40s, rtx4090.")
]
Engine = Annotated[
    str | None,
    typer.Option(help="resident: the whole model in memory; streamed: layer by layer; auto (default): what fits."),
]
Scratch = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Where the streamed engine stores hidden states. Default: in memory."),
]
Segments = Annotated[
    bool | None,
    typer.Option("--segments/--no-segments", help="Compare scores inside CKA segments. Default: sglp does."),
]
NumSegments = Annotated[str | None, typer.Option(help="Number of CKA segments, or auto (default).")]
SegmentsRule = Annotated[
    str | None,
    typer.Option(help="How that number is found: auto (default), or paper, as the paper's published code does."),
]
Features = Annotated[
    str | None, typer.Option(help="What segments are computed from: column_sum (default) or rows of the CKA matrix.")
]
MinDrop = Annotated[
    float | None,
    typer.Option(help="No more segments where one more lowers the Fisher loss by less than this share. Default: 0.05."),
]
Option = Annotated[list[str] | None, typer.Option(help="CRITERION.KEY=VALUE, such as angular.tokens=all; repeatable.")]
Kernel = Annotated[str | None, typer.Option(help="CKA kernel: cosine (default) or linear (the paper's).")]
ProtectFirst = Annotated[int | None, typer.Option(help="Layers at the front that are never removed. Default: 0.")]
ProtectLast = Annotated[int | None, typer.Option(help="Layers at the end that are never removed. Default: 0.")]
Compensate = Annotated[
    str | None,
    typer.Option(
        help="Fold what the removed layers did into weights that are kept: none, scale, linear, refit, auto or learned."
    ),
]
PushToHub = Annotated[str | None, typer.Option(metavar="REPO", help="Upload the finished folder to the Hub.")]
Private = Annotated[bool, typer.Option(help="Create the Hub repository private.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

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
        "num_segments": int(number) if number is not None and re.fullmatch("-?[0-9]+", number) else number,
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
        options.setdefault(name, {})[key] = _number(value)
    return options


def _number(text: str) -> int | float | str:
    """The text as a number where it is one."""
    if re.fullmatch("-?[0-9]+", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?[0-9]+\.[0-9]+", text) else text


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


def preset_of(preset: str | None, recipe: str | None, settings: dict[str, Any]) -> str | None:
    """The given preset, or the default one where nothing else says how layers are chosen."""
    from sglp_llm.plan import preset_or_default

    return preset if recipe is not None else preset_or_default(preset, settings)


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
    from sglp_llm.plan.healing_recipe import healing_changes
    from sglp_llm.sizes import parse_count

    own = {} if name is None else healing_recipe_of(name, None, None).to_dict()
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
