"""The lists that ``sglp-llm ls`` prints."""

from __future__ import annotations

from inspect import getdoc
from types import ModuleType

import sglp_llm.compensation as compensation
import sglp_llm.criteria as criteria
from sglp_llm.adapters import adapter_names, get_adapter
from sglp_llm.adapters.structure.probed import probed
from sglp_llm.compensation import compensation_names
from sglp_llm.criteria import criterion_names, get_criterion
from sglp_llm.engine import Need
from sglp_llm.errors import unknown
from sglp_llm.evaluation.suites import load_suite
from sglp_llm.plan import Recipe, load_recipe, preset_names, preset_settings
from sglp_llm.plan.healing_recipe import load_healing_recipe
from sglp_llm.plan.shipped import (
    DEFAULT_PRESET,
    preset_description,
    shipped_healing_recipes,
    shipped_recipes,
    shipped_suites,
)
from sglp_llm.registry import member


def catalog(what: str) -> tuple[str, list[str], list[list[str]]]:
    """Title, column names and rows.

    Args:
        what: ``adapters``, ``criteria``, ``compensations``, ``presets``, ``recipes``, ``healing-recipes`` or ``suites``.

    Raises:
        UserError: ``what`` is none of these.
    """
    makers = {
        "adapters": _adapters,
        "criteria": _criteria,
        "compensations": _compensations,
        "presets": _presets,
        "recipes": _recipes,
        "healing-recipes": _healing_recipes,
        "suites": _suites,
    }
    if what not in makers:
        raise unknown("list", what, makers)
    return makers[what]()


def _adapters() -> tuple[str, list[str], list[list[str]]]:
    written, table = adapter_names(), probed()
    rows = [[name, "written", get_adapter(name).display_name] for name in written]
    rows += [
        [name, found["adapter"], table.limits_of(name)] for name, found in table.types.items() if name not in written
    ]
    title = f"Model types of transformers {table.transformers}; of others an adapter is derived, or refused, when they are met"
    return title, ["model_type", "adapter", "what it is, or what is refused and why"], sorted(rows)


def _criteria() -> tuple[str, list[str], list[list[str]]]:
    rows = [["sglp", "segments + gradients", "The paper's pipeline: CKA segments, gradnorm inside each."]]
    for name in criterion_names():
        criterion = get_criterion(name)
        needs = " + ".join(each.lower().replace("_", " ") for each in _need_names(criterion.needs)) or "nothing"
        rows.append([name, needs, _headline(criteria, name)])
    return "Criteria", ["name", "needs", "what it is"], rows


def _need_names(needs: Need) -> list[str]:
    """The single flags of a combination; Python 3.10 cannot iterate over one."""
    return [name for name, need in Need.__members__.items() if need.value.bit_count() == 1 and need in needs]


def _compensations() -> tuple[str, list[str], list[list[str]]]:
    rows = [[name, _headline(compensation, name)] for name in compensation_names()]
    return "Compensations", ["name", "what it is"], rows


def _presets() -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for name in preset_names():
        recipe = Recipe().with_changes(**preset_settings(name))
        training = "none" if recipe.healing is None else f"{recipe.healing.tokens:,} tokens"
        title = f"{name} (default)" if name == DEFAULT_PRESET else name
        rows.append([title, recipe.criterion, recipe.compensate, training, preset_description(name)])
    return "Presets", ["name", "criterion", "compensate", "training", "what it is"], rows


def _recipes() -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for name in shipped_recipes():
        recipe = load_recipe(name)
        budget = ", ".join(f"{key} {value}" for key, value in recipe.budget.to_dict().items())
        rows.append([name, str(recipe.model), budget, recipe.criterion])
    return "Recipes", ["name", "model", "budget", "criterion"], rows


def _healing_recipes() -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for name in shipped_healing_recipes():
        recipe = load_healing_recipe(name)
        length = next(
            f"{recipe.to_dict()[key]:,} {key}" for key in ("tokens", "minutes", "epochs") if key in recipe.to_dict()
        )
        rows.append([name, recipe.train, "teacher" if recipe.distil else "next token", recipe.data, length])
    return "Healing recipes", ["name", "trains", "on", "data", "length"], rows


def _suites() -> tuple[str, list[str], list[list[str]]]:
    rows = [[name, ", ".join(load_suite(name).tasks)] for name in shipped_suites()]
    return "Suites of lm-eval tasks", ["name", "tasks"], rows


def _headline(room: ModuleType, name: str) -> str:
    """The first sentence of a member's docstring."""
    text = getdoc(member(room.__name__, room.__path__, name, "member")) or ""
    return " ".join(text.split("\n\n")[0].split())
