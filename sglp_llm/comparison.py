"""Many criteria at many depths on one model, one calibration set and one set of measurements."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
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
from sglp_llm.evaluation.shared import window_losses_without
from sglp_llm.journal import Journal
from sglp_llm.progress import Progress, silent
from sglp_llm.recipe import Recipe
from sglp_llm.records import Budget, Comparison, ComparisonRow, Measured
from sglp_llm.selection import check_budget, number_to_remove, removable_layers
from sglp_llm.subject import Subject
from sglp_llm.version import __version__

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_WINDOWS_A_PIECE = 16


@dataclass(frozen=True)
class Measurement:
    """Something that is measured on every shortened model.

    Attributes:
        name: For tables.
        key: Everything that its numbers depend on beside the model.
        measure: What it finds on a live model; ``perplexity`` among the numbers is what is plotted.
        windows: Where it is a perplexity: what it is measured on, ``[windows, window]``, and
        summarise: what becomes of the windows' losses.
    """

    name: str
    key: str
    measure: Callable[[PreTrainedModel], Measured]
    windows: torch.Tensor | None = None
    summarise: Callable[[Sequence[float]], Measured] | None = None


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
    measured = _measured(subject, [removed for _, removed in plans], measurements, journal, progress)
    dense = measured[()]
    dense_losses = {name: found.losses for name, found in dense.items()}

    def row(criterion: str, removed: tuple[int, ...]) -> ComparisonRow:
        found = measured[removed]
        results = {name: each.numbers | _gap(each.losses, dense_losses[name]) for name, each in found.items()}
        losses = {name: each.losses for name, each in found.items()}
        return ComparisonRow(criterion, round(len(removed) / subject.num_layers, 4), removed, results, losses)

    return Comparison(
        model=subject.identity.name,
        num_layers=subject.num_layers,
        dense={name: found.numbers | _gap(found.losses, found.losses) for name, found in dense.items()},
        dense_losses=dense_losses,
        rows=tuple(row(name, tuple(sorted(removed))) for name, removed in plans),
        selection_seconds=seconds,
        settings=settings,
        versions=software_versions(),
    )


def _gap(losses: Sequence[float], dense: Sequence[float]) -> dict[str, float]:
    """How far a model's log perplexity is above the dense model's, with the standard error of the paired differences."""
    if not losses:
        return {}
    gaps = [own - other for own, other in zip(losses, dense, strict=True)]
    error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return {"log_gap": fmean(gaps), "log_gap_standard_error": error}


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
) -> dict[tuple[int, ...], dict[str, Measured]]:
    """What is found on the whole model, ``()``, and on each different plan, by measurement."""
    different = list(dict.fromkeys([(), *(tuple(sorted(plan)) for plan in plans)]))
    results: dict[tuple[int, ...], dict[str, Measured]] = {plan: {} for plan in different}
    for measurement in measurements:
        if measurement.windows is not None:
            found = _window_losses(subject, different, measurement.key, measurement.windows, journal, progress)
            assert measurement.summarise is not None
            for plan, losses in found.items():
                results[plan][measurement.name] = measurement.summarise(losses)
            continue
        with progress("Measuring", len(different)) as advance:
            for plan in different:

                def one(plan: tuple[int, ...] = plan, measurement: Measurement = measurement) -> dict[str, Any]:
                    with shortened(subject.load().model, plan) as model:
                        return asdict(measurement.measure(model))

                kept = journal.once(f"{measurement.key} without {list(plan)}", one)
                results[plan][measurement.name] = Measured(kept["numbers"], tuple(kept["losses"]))
                advance(1)
    return results


def _window_losses(
    subject: Subject,
    plans: Sequence[tuple[int, ...]],
    key: str,
    windows: torch.Tensor,
    journal: Journal,
    progress: Progress,
) -> dict[tuple[int, ...], list[float]]:
    """The loss of every window for every plan: some windows at a time, all plans together."""
    losses: dict[tuple[int, ...], list[float]] = {plan: [] for plan in plans}
    with progress("Measuring", len(windows)) as advance:
        for first, part in zip(range(0, len(windows), _WINDOWS_A_PIECE), windows.split(_WINDOWS_A_PIECE), strict=True):
            pieces = {plan: f"{key} from window {first} without {list(plan)}" for plan in plans}
            if missing := [frozenset(plan) for plan, piece in pieces.items() if journal.get(piece) is None]:
                found = window_losses_without(subject.load(), part, missing)
                for removed, values in found.items():
                    journal.once(pieces[tuple(sorted(removed))], partial(list, values))
            for plan, piece in pieces.items():
                losses[plan] += journal.get(piece)
            advance(len(part))
    return losses
