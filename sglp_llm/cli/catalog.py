"""The lists that ``sglp-llm ls`` prints."""

from __future__ import annotations

from inspect import getdoc
from types import ModuleType

import sglp_llm.compensation as compensation
import sglp_llm.criteria as criteria
from sglp_llm.adapters import adapter_names, get_adapter
from sglp_llm.adapters.structure.probed import probed
from sglp_llm.cli.memory_table import price_line
from sglp_llm.compensation import Method, compensation_names, get_method
from sglp_llm.criteria import Criterion, ScoreCriterion, criterion_names, get_criterion
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
    passes = _PASSES[Need.GRADIENT_NORMS]
    rows = [["sglp", passes, "scores", "The paper's pipeline: CKA segments, gradnorm inside each."]]
    for name in criterion_names():
        criterion = get_criterion(name)
        kind = "scores" if issubclass(criterion, ScoreCriterion) else "a set"
        rows.append([name, _criterion_cost(criterion), kind, _headline(criteria, name)])
    return "Criteria; scores can be compared inside segments", ["name", "costs", "gives", "what it is"], rows


_PASSES = {
    Need.WEIGHTS: "reads the weights",
    Need.SYNAPTIC_FLOW: "1 forward and backward pass of one token",
    Need.HIDDEN_STATES: "1 forward pass",
    Need.GRADIENTS: "1 forward and backward pass, whole gradients",
    Need.GRADIENT_NORMS: "1 forward and backward pass",
    Need.STATE_GRADIENTS: "1 forward and backward pass",
}


def _criterion_cost(criterion: type[Criterion]) -> str:
    """In passes over the calibration text, or in trials: runs of the model without some layers."""
    wants = criterion.needs
    costs = [cost for need, cost in _PASSES.items() if need in wants | criterion.needs_with_trials]
    if Need.TRIALS in wants:
        costs.append(criterion(1).price(Recipe().samples, Recipe().seq_len) or criterion.trial_cost)
    return "; ".join(costs) or "nothing"


def _compensations() -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for name in compensation_names():
        method = get_method(name)
        rows.append(
            [name, _equations(method), "yes" if method.refined_sequences else "no", _headline(compensation, name)]
        )
    return "Compensations", ["name", "equations in memory", "gradients", "what it is"], rows


def _equations(method: Method) -> str:
    if not method.matrices:
        return "small"
    return f"{method.matrices} float64 matrices as wide as the {'MLP' if method.of_inputs else 'hidden states'}"


def _presets() -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for name in preset_names():
        recipe = Recipe().with_changes(**preset_settings(name))
        title = f"{name} (default)" if name == DEFAULT_PRESET else name
        cost = (price_line(recipe) or _PASSES[Need.GRADIENT_NORMS]).removeprefix("Cost: about ")
        rows.append([title, recipe.criterion, recipe.compensate, cost, preset_description(name)])
    return "Presets", ["name", "criterion", "compensate", "costs", "what it is"], rows


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
