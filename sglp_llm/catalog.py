"""What there is to choose from, for ``sglp-llm ls``."""

from __future__ import annotations

from inspect import getdoc
from types import ModuleType

import sglp_llm.compensation as compensation
import sglp_llm.criteria as criteria
from sglp_llm.adapters import adapter_names, get_adapter
from sglp_llm.compensation import compensation_names
from sglp_llm.criteria import criterion_names, get_criterion
from sglp_llm.errors import unknown
from sglp_llm.recipe import Recipe, load_recipe, preset_description, preset_names, preset_settings, recipe_names
from sglp_llm.registry import member


def catalog(what: str) -> tuple[str, list[str], list[list[str]]]:
    """Title, column names and rows.

    Args:
        what: ``adapters``, ``criteria``, ``compensations``, ``presets`` or ``recipes``.

    Raises:
        UserError: It is something else.
    """
    makers = {
        "adapters": _adapters,
        "criteria": _criteria,
        "compensations": _compensations,
        "presets": _presets,
        "recipes": _recipes,
    }
    if what not in makers:
        raise unknown("list", what, makers)
    return makers[what]()


def _adapters() -> tuple[str, list[str], list[list[str]]]:
    rows = [[name, get_adapter(name).display_name] for name in adapter_names()]
    return "Model families", ["model_type", "family"], rows


def _criteria() -> tuple[str, list[str], list[list[str]]]:
    rows = [["sglp", "segments + gradients", "The paper's pipeline: CKA segments, gradnorm inside each (the default)."]]
    for name in criterion_names():
        criterion = get_criterion(name)
        needs = " + ".join(need.name.lower().replace("_", " ") for need in criterion.needs if need.name) or "nothing"
        rows.append([name, needs, _headline(criteria, name)])
    return "Criteria", ["name", "needs", "what it is"], rows


def _compensations() -> tuple[str, list[str], list[list[str]]]:
    rows = [[name, _headline(compensation, name)] for name in compensation_names()]
    return "Compensations", ["name", "what it is"], rows


def _presets() -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for name in preset_names():
        recipe = Recipe().with_changes(**preset_settings(name))
        rows.append([name, recipe.criterion, recipe.compensate, preset_description(name)])
    return "Presets", ["name", "criterion", "compensate", "what it is"], rows


def _recipes() -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        budget = ", ".join(f"{key} {value}" for key, value in recipe.budget.to_dict().items())
        rows.append([name, str(recipe.model), budget, recipe.criterion])
    return "Recipes", ["name", "model", "budget", "criterion"], rows


def _headline(room: ModuleType, name: str) -> str:
    """The first sentence of a member's docstring."""
    text = getdoc(member(room.__name__, room.__path__, name, "member")) or ""
    return " ".join(text.split("\n\n")[0].split())
