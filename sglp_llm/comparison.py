"""Many criteria at many depths on one model, one calibration set and one set of measurements."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglp_llm.analysis import (
    Observations,
    check_criteria,
    choose_layers,
    deciding_criterion,
    is_segmented,
    observe,
    software_versions,
)
from sglp_llm.calibration import CalibrationSet
from sglp_llm.checkpoint.export import shortened
from sglp_llm.criteria import GreedyCriterion, get_criterion, make_criterion
from sglp_llm.engine.observer import Need
from sglp_llm.engine.trials import Trials
from sglp_llm.errors import UserError
from sglp_llm.journal import Journal
from sglp_llm.progress import Progress, silent
from sglp_llm.recipe import Recipe
from sglp_llm.records import Budget, Comparison, ComparisonRow
from sglp_llm.selection import check_budget, number_to_remove, removable_layers
from sglp_llm.subject import Subject
from sglp_llm.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Measurement:
    """Something that is measured on every shortened model.

    Attributes:
        name: For tables.
        key: Everything that its numbers depend on beside the model.
        measure: Gives numbers by name, for a live model; ``perplexity`` among them is what is plotted.
    """

    name: str
    key: str
    measure: Callable[[PreTrainedModel], dict[str, float]]


def compare(
    subject: Subject,
    calibration: CalibrationSet,
    recipe: Recipe,
    criteria: Sequence[str],
    budgets: Sequence[Budget],
    measurements: Sequence[Measurement],
    folder: Path,
    progress: Progress = silent,
) -> Comparison:
    """Lets every criterion choose at every depth and measures what is left, in memory.

    All criteria that watch hidden states or gradients share one pass; equal choices are measured once. What is finished is
    kept in ``folder/journal``, and a run that was interrupted goes on from there.

    Args:
        subject: The model.
        calibration: The sequences that the criteria see.
        recipe: Settings of the criteria; its criterion, budget and compensation are not used.
        criteria: Names, ``sglp`` among them.
        budgets: Ratios or numbers of layers.
        measurements: What is measured.
        folder: For the journal.
        progress: Told how far everything is.

    Raises:
        UserError: A criterion or budget does not fit.
    """
    if len(set(criteria)) != len(criteria):
        raise UserError(f"criteria: a name stands twice in {', '.join(criteria)}")
    recipes = {name: [_recipe_of(recipe, name, budget) for budget in budgets] for name in criteria}
    protect = (recipe.protect.first, recipe.protect.last)
    for each in recipes.values():
        check_criteria(each[0])
    for budget in budgets:
        check_budget(budget, subject.num_layers, protect)
    settings = {**recipe.to_dict(), "calibration_hash": calibration.hash}
    idle = "criterion also ratio drop target_params compensate held_out max_shard_size batch_size engine scratch"
    for key in idle.split():
        settings.pop(key, None)
    # Another version may keep its pieces in another form.
    known = {**settings, "model": subject.identity.fingerprint, "sglp-llm": __version__}
    journal = Journal(folder / "journal", known)
    chosen, seconds = _choices(subject, calibration, recipe, recipes, journal, progress)
    plans = [(name, removed) for name in criteria for removed in chosen[name]]
    dense, results = _measured(subject, [removed for _, removed in plans], measurements, journal, progress)
    rows = tuple(
        ComparisonRow(
            name, round(len(removed) / subject.num_layers, 4), tuple(sorted(removed)), results[tuple(sorted(removed))]
        )
        for name, removed in plans
    )
    return Comparison(subject.identity.name, subject.num_layers, dense, rows, seconds, settings, software_versions())


def _recipe_of(recipe: Recipe, criterion: str, budget: Budget) -> Recipe:
    """The settings of one criterion at one depth, with its own options alone."""
    chosen = replace(recipe, criterion=criterion, also=(), ratio=budget.ratio, drop=budget.drop, target_params=None)
    name = deciding_criterion(chosen)
    return replace(chosen, options={name: recipe.options[name]} if name in recipe.options else {})


def _choices(
    subject: Subject,
    calibration: CalibrationSet,
    recipe: Recipe,
    recipes: dict[str, list[Recipe]],
    journal: Journal,
    progress: Progress,
) -> tuple[dict[str, list[list[int]]], dict[str, float]]:
    """For each criterion the layers it removes at each depth, and the seconds that took."""
    names = {name: deciding_criterion(each[0]) for name, each in recipes.items()}
    watching = [name for name, deciding in names.items() if Need.TRIALS not in get_criterion(deciding).needs]
    chosen: dict[str, list[list[int]]] = {}
    seconds: dict[str, float] = {}

    def together(group: Sequence[str]) -> dict[str, Any]:
        start = time.perf_counter()
        segmented = any(is_segmented(recipes[name][0]) for name in group)
        deciding = [names[name] for name in group]
        observations = observe(subject.load(), calibration, recipe, deciding, segmented, progress)
        choices = {name: _chosen(subject, recipes[name], observations) for name in group}
        return {"choices": choices, "seconds": time.perf_counter() - start}

    depths = [each.budget.to_dict() for each in next(iter(recipes.values()))]
    if watching:
        kept = journal.once(f"pass of {watching} at {depths}", lambda: together(watching))
        chosen |= kept["choices"]
        seconds["shared pass"] = kept["seconds"]
    for name in recipes:
        if name in watching:
            continue
        if issubclass(get_criterion(name), GreedyCriterion):
            chosen[name], seconds[name] = _greedy(name, subject, calibration, recipes[name], journal, progress)
            continue
        kept = journal.once(f"trials of {name} at {depths}", partial(together, [name]))
        chosen |= kept["choices"]
        seconds[name] = kept["seconds"]
    return chosen, seconds


def _chosen(subject: Subject, recipes: list[Recipe], observations: Observations) -> list[list[int]]:
    return [list(choose_layers(each, subject.load(), observations)[0]) for each in recipes]


def _greedy(
    name: str,
    subject: Subject,
    calibration: CalibrationSet,
    recipes: list[Recipe],
    journal: Journal,
    progress: Progress,
) -> tuple[list[list[int]], float]:
    """Each round is a piece of work of its own: the rounds of a shallower plan are the first of a deeper one's."""
    recipe = recipes[0]
    protect = (recipe.protect.first, recipe.protect.last)
    removable = removable_layers(subject.num_layers, protect)
    numbers = [number_to_remove(each.budget, subject.num_layers, len(removable)) for each in recipes]
    order: list[int] = []
    seconds = 0.0
    for count in range(1, max(numbers) + 1):

        def one_round(count: int = count, order: list[int] = order) -> dict[str, Any]:
            start = time.perf_counter()
            criterion = make_criterion(name, subject.num_layers, recipe.seed, recipe.options.get(name))
            assert isinstance(criterion, GreedyCriterion)
            criterion.on_trials(Trials(subject.load(), calibration.first(recipe.trial_samples), progress=progress))
            criterion.continue_from(order, removable)
            return {"order": criterion.choose(count, removable), "seconds": time.perf_counter() - start}

        kept = journal.once(f"round {count} of {name}", one_round)
        order, seconds = kept["order"], seconds + kept["seconds"]
    return [order[:number] for number in numbers], seconds


def _measured(
    subject: Subject,
    plans: Sequence[Sequence[int]],
    measurements: Sequence[Measurement],
    journal: Journal,
    progress: Progress,
) -> tuple[dict[str, dict[str, float]], dict[tuple[int, ...], dict[str, dict[str, float]]]]:
    """Numbers of the whole model, and of each different plan, by measurement and name."""
    different = list(dict.fromkeys([(), *(tuple(sorted(plan)) for plan in plans)]))
    results: dict[tuple[int, ...], dict[str, dict[str, float]]] = {plan: {} for plan in different}
    with progress("Measuring", len(different) * len(measurements)) as advance:
        for plan in different:
            for measurement in measurements:

                def numbers(plan: tuple[int, ...] = plan, measurement: Measurement = measurement) -> dict[str, float]:
                    with shortened(subject.load().model, plan) as model:
                        return measurement.measure(model)

                piece = f"{measurement.key} without {list(plan)}"
                results[plan][measurement.name] = journal.once(piece, numbers)
                advance(1)
    return results[()], results
