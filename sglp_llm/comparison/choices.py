"""Selects the layers that many criteria remove at many depths; shared work is done once, finished work is kept in a journal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sglp_llm.analysis.decisions import choose_layers, finalists
from sglp_llm.analysis.observing import Observations, observe
from sglp_llm.calibration import CalibrationSet
from sglp_llm.criteria import GreedyCriterion, get_criterion, make_criterion
from sglp_llm.engine import Need
from sglp_llm.method.selection import number_to_remove, removable_layers
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import Recipe, preset_settings
from sglp_llm.progress import Progress
from sglp_llm.trials import Journal, Trials


def choices(
    opened: OpenedModel,
    calibration: CalibrationSet,
    recipe: Recipe,
    choosers: Mapping[str, list[Recipe]],
    journal: Journal,
    progress: Progress,
) -> tuple[dict[str, list[list[list[int]]]], dict[str, float]]:
    """The candidate sets of each layer selection at each depth, and the wall times.

    Args:
        opened: The model.
        calibration: The sequences.
        recipe: The settings that all share, with the options of all criteria.
        choosers: The settings of each selection at each depth, by criterion, or by preset where it has settings of its own.
        journal: Keeps finished work.
        progress: Reports progress.

    Returns:
        For each selection and depth the candidate sets, best first and often only one, each in the order of removal; and the
        seconds of each selection, those of the shared pass under ``shared pass``.
    """
    deciding = {name: each[0].deciding_criterion for name, each in choosers.items()}
    chosen: dict[str, list[list[list[int]]]] = {}
    seconds: dict[str, float] = {}

    def together(group: Sequence[str], shared: Recipe) -> dict[str, Any]:
        start = time.perf_counter()
        segmented = any(choosers[name][0].is_segmented for name in group)
        names = [deciding[name] for name in group]
        observations = observe(opened.load(), calibration, shared, names, segmented, progress)
        sets = {name: [_sets(opened, each, observations) for each in choosers[name]] for name in group}
        return {"sets": sets, "seconds": time.perf_counter() - start}

    depths = [each.budget.to_dict() for each in next(iter(choosers.values()))]
    # A preset's own settings may change the pass itself, so only plain criteria share one.
    sharing = [
        name
        for name, each in choosers.items()
        if name == each[0].criterion and Need.TRIALS not in get_criterion(deciding[name]).needs
    ]
    if sharing:
        kept = journal.once(f"sets from the pass of {sharing} at {depths}", lambda: together(sharing, recipe))
        chosen |= kept["sets"]
        seconds["shared pass"] = kept["seconds"]
    for name, recipes in choosers.items():
        if name in sharing:
            continue
        known = name if name == recipes[0].criterion else f"{name} {preset_settings(name)}"
        if issubclass(get_criterion(deciding[name]), GreedyCriterion):
            found, seconds[name] = _greedy(known, opened, calibration, recipes, journal, progress)
            chosen[name] = [[each] for each in found]
            continue
        kept = journal.once(f"sets from trials of {known} at {depths}", partial(together, [name], recipes[0]))
        chosen |= kept["sets"]
        seconds[name] = kept["seconds"]
    return chosen, seconds


def _sets(opened: OpenedModel, recipe: Recipe, observations: Observations) -> list[tuple[int, ...]]:
    removed, _ = choose_layers(recipe, opened.footprint(), observations)
    return finalists(recipe, opened.num_layers, observations, removed)


def _greedy(
    known: str,
    opened: OpenedModel,
    calibration: CalibrationSet,
    recipes: list[Recipe],
    journal: Journal,
    progress: Progress,
) -> tuple[list[list[int]], float]:
    """Keeps each round in the journal by itself: the rounds for a smaller budget are the first ones for a larger budget."""
    recipe = recipes[0]
    name = recipe.deciding_criterion
    protect = (recipe.protect.first, recipe.protect.last)
    removable = removable_layers(opened.num_layers, protect, opened.staying)
    numbers = [number_to_remove(each.budget, opened.num_layers, len(removable)) for each in recipes]
    order: list[int] = []
    seconds = 0.0
    for count in range(1, max(numbers) + 1):

        def one_round(count: int = count, order: list[int] = order) -> dict[str, Any]:
            start = time.perf_counter()
            criterion = make_criterion(name, opened.num_layers, recipe.seed, recipe.options.get(name))
            assert isinstance(criterion, GreedyCriterion)
            criterion.on_trials(Trials(opened.load(), calibration.first(recipe.trial_samples), progress=progress))
            criterion.staying = opened.staying
            criterion.continue_from(order, removable)
            return {"order": criterion.choose(count, removable), "seconds": time.perf_counter() - start}

        kept = journal.once(f"round {count} of {known}", one_round)
        order, seconds = kept["order"], seconds + kept["seconds"]
    return [order[:number] for number in numbers], seconds
