"""Chooses layers again from the scores and the CKA matrix that a plan keeps, for another budget or other segments."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sglp_llm.analysis.decisions import check_reachable, check_selection, choose_by_scores
from sglp_llm.analysis.observing import CKA_COLUMN_SUM
from sglp_llm.analysis.run import plan_settings
from sglp_llm.analysis.targets import check_context
from sglp_llm.compensation import NONE
from sglp_llm.criteria import SetCriterion, criterion_names, get_criterion
from sglp_llm.errors import UserError, unknown
from sglp_llm.method.staying import staying_from
from sglp_llm.plan import RECIPE_FILE_NAME, Recipe, load_plan
from sglp_llm.plan.recipe import recipe_from_dict
from sglp_llm.records import PrunePlan

SETTINGS = (
    *("ratio", "drop", "target_params", "target_memory", "target_latency", "context"),
    *("criterion", "segments", "num_segments", "segments_rule", "features", "min_drop", "protect", "compensate"),
)
"""What the choice depends on; all but ``target_latency`` can be changed without the model."""


def replan(plan: PrunePlan | str | Path, **settings: Any) -> PrunePlan:
    """Chooses the layers to remove again, with other settings, from what an analysis has measured. The model is not needed.

    The result is the plan of a new analysis with these settings. Nothing is written.

    Args:
        plan: The plan of an analysis, or the file or folder that it is in.
        **settings: Settings of the recipe that change; the others are the plan's. `SETTINGS` can: the budget (``ratio``,
            ``drop``, ``target_params``, ``target_memory`` with ``context``), the segments, the protected layers, and the
            criterion, if the analysis scored layers by it. A compensation is fitted to the removed layers:
            ``compensate="none"`` leaves it out.

    Raises:
        UserError: The plan does not hold what the choice needs, such as scores; the message names the command that measures it.
            Or a setting is unknown, cannot be changed, or does not fit the model.
    """
    where = None if isinstance(plan, PrunePlan) else Path(plan)
    old = plan if isinstance(plan, PrunePlan) else load_plan(plan)
    for name in settings:
        if name not in SETTINGS:
            raise unknown("setting of replan", name, SETTINGS)
    recipe = _recipe_of(old, "the plan" if where is None else str(where)).with_changes(**settings)
    if problem := _missing(old, recipe):
        raise UserError(f"{problem}: {_fresh_analysis(old, where, {**recipe.budget.to_dict(), **settings})}")
    limits = staying_from(old.settings.get("staying"), "the plan" if where is None else str(where))
    check_selection(recipe, old.num_layers, limits)
    if old.footprint is not None:
        check_context(recipe, old.footprint.positions, "the model")
        check_reachable(recipe, old.footprint, limits)
    scores = old.scores[recipe.deciding_criterion]
    removed, segments = choose_by_scores(recipe, scores, old.similarity, old.footprint, limits)
    measured = {key: value for key, value in old.settings.items() if key not in _settings_of_the_choice()}
    return replace(
        old,
        kept=tuple(layer for layer in range(old.num_layers) if layer not in removed),
        segments=segments,
        budget=recipe.budget.to_dict(),
        settings={**plan_settings(recipe, removed), **measured},
        replaced={},
        compensation={},
    )


def _recipe_of(plan: PrunePlan, where: str) -> Recipe:
    """The recipe that led to a plan, as far as the plan holds it."""
    names = {each.name for each in fields(Recipe)}
    return recipe_from_dict({**{key: plan.settings[key] for key in names & set(plan.settings)}, **plan.budget}, where)


def _settings_of_the_choice() -> set[str]:
    """The keys of `PrunePlan.settings` that another choice sets anew, or has no use for."""
    return {*(each.name for each in fields(Recipe)), "scored_by", "removal_order", "decode_times"}


def _missing(plan: PrunePlan, recipe: Recipe) -> str | None:
    """What the plan lacks for the recipe, as the beginning of a message; ``None`` if it lacks nothing."""
    if recipe.target_latency is not None:
        return "target_latency is measured on the model itself; give a ratio or a number of layers, or analyse again"
    name = recipe.deciding_criterion
    if name not in plan.scores:
        known = f"the plan has scores of {', '.join(plan.scores) or 'no criterion'}"
        if name in criterion_names() and issubclass(get_criterion(name), SetCriterion):
            return f"{name} gives a set for one number of layers, and no scores ({known}); analyse again"
        return f"{known}, and not of {name}; analyse again"
    if recipe.compensate != NONE:
        return f"{recipe.compensate} is fitted to the removed layers on text; choose with compensate none, or analyse again"
    # A matrix without the column sums is one that a criterion has computed for itself, on other sequences.
    if recipe.is_segmented and (plan.similarity is None or CKA_COLUMN_SUM not in plan.scores):
        return "the plan has no CKA matrix, which segments come from; choose without segments, or analyse again"
    if plan.footprint is None and (recipe.target_params or recipe.target_memory):
        return "the plan does not say how large the layers are, which a target needs; analyse again"
    return None


def _fresh_analysis(plan: PrunePlan, where: Path | None, settings: Mapping[str, Any]) -> str:
    """The command of a new analysis with these settings, and the plan's own for the rest."""
    words = ["sglp-llm", "analyze", "MODEL" if plan.source is None else plan.source.name]
    if where is not None:
        beside = (where if where.is_dir() else where.parent) / RECIPE_FILE_NAME
        words += ["--recipe", str(beside)] if beside.is_file() else []
    if "--recipe" not in words:
        settings = {"criterion": plan.settings.get("criterion"), **settings}
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-"))
        elif isinstance(value, Mapping):
            words += [word for end, number in value.items() for word in (f"{option}-{end}", str(number))]
        elif value is not None:
            words += [option, str(value)]
    return shlex.join([*words, "--output", "DIR"])
