"""The methods of a comparison, by name: a criterion or a preset, with or without a compensation (``angular+linear``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglp_llm.compensation import NONE, compensation_names
from sglp_llm.criteria import criterion_names
from sglp_llm.errors import unknown
from sglp_llm.plan import Recipe, preset_names, preset_settings
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.plan.recipe import SGLP
from sglp_llm.records import Budget

_SEARCH = "search"
_HEALED = "+heal"


def method_recipe(recipe: Recipe, method: str, budget: Budget) -> Recipe:
    """The settings of one method at one depth.

    Args:
        recipe: The settings that all methods share; its criterion, budget and compensation are not used. Its options of a
            criterion override a preset's.
        method: A criterion, ``sglp``, or a preset; ``+NAME`` adds a compensation, and ``+heal`` at the end training after it. A
            name that is both means the preset.
        budget: How much to remove.

    Raises:
        UserError: The criterion, preset or compensation is unknown, or the settings do not fit together.
    """
    base, plus, compensation = method.removesuffix(_HEALED).partition("+")
    settings = _settings_of(base)
    # All methods see the same sequences, however many a preset would take, and compute alike.
    shared = {"samples", "seq_len", "calibration", "trial_dtype", *(["trial_samples"] if recipe.trial_samples else [])}
    settings = {key: value for key, value in settings.items() if key not in shared}
    if plus:
        if compensation not in (NONE, *compensation_names()):
            raise unknown(f"compensation in {method!r}:", compensation, [NONE, *compensation_names()])
        settings["compensate"] = compensation
    return _with_settings(recipe, settings, budget)


def is_single(recipe: Recipe) -> bool:
    """Whether a method is one criterion alone: neither a search over sets that others propose, nor with a compensation."""
    return recipe.compensate == NONE and recipe.criterion != _SEARCH


def training_of(recipe: Recipe, method: str, healing: HealingRecipe | None) -> HealingRecipe | None:
    """How a method's model is trained after the removal; ``None`` = not at all.

    Args:
        recipe: The method's own settings.
        method: Its name.
        healing: For names that end in ``+heal``; the defaults are `HealingRecipe`'s.
    """
    return (healing or HealingRecipe()) if method.endswith(_HEALED) else recipe.healing


def chooser(recipe: Recipe, method: str, budget: Budget) -> str:
    """The name of a method's layer selection: methods with the same name select alike.

    It is the criterion's name, or the preset's where the preset sets more than the criterion and the compensation.
    """
    own = method_recipe(recipe, method, budget)
    plain = _with_settings(recipe, {"criterion": own.criterion}, budget)
    # These matter after the candidate sets are selected.
    alike = replace(own, compensate=plain.compensate, held_out=plain.held_out, candidates=plain.candidates, heal=False)
    return own.criterion if alike == plain else method.partition("+")[0]


def _settings_of(base: str) -> dict[str, Any]:
    if base in preset_names():
        return preset_settings(base)
    if base in (SGLP, *criterion_names()):
        return {"criterion": base}
    raise unknown("criterion or preset", base, {SGLP, *criterion_names(), *preset_names()})


def _with_settings(recipe: Recipe, settings: dict[str, Any], budget: Budget) -> Recipe:
    given = settings.get("options", {})
    neutral = replace(recipe, also=(), options={}, compensate=NONE, heal=False)
    own = neutral.with_changes(**{**settings, "options": None}, **budget.to_dict())
    name = own.deciding_criterion
    options = {**given.get(name, {}), **recipe.options.get(name, {})}
    return replace(own, options={name: options} if options else {})
