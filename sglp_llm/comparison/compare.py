"""Compares many methods at many depths on one model, one calibration set and one set of measurements."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sglp_llm.analysis import plan_settings, software_versions
from sglp_llm.analysis.decisions import Judge, repair_best
from sglp_llm.analysis.observing import check_criteria
from sglp_llm.calibration import CalibrationSet
from sglp_llm.checkpoint.replaced import as_stored
from sglp_llm.comparison.choices import choices
from sglp_llm.comparison.healed import DecidedRow, RunOfComparison, trained_after
from sglp_llm.comparison.measured import Measuring, Shortened, measured
from sglp_llm.comparison.methods import chooser, is_single, method_recipe, training_of
from sglp_llm.comparison.pairs import paired_difference, pairs
from sglp_llm.compensation import NONE, check_compensation
from sglp_llm.errors import UserError
from sglp_llm.evaluation.judge import open_judge
from sglp_llm.method.selection import check_budget
from sglp_llm.models.finite import naming_layers
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import PLAN_FILE_NAME, Recipe, load_plan, plan_from_indices, save_plan
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.progress import Progress, silent
from sglp_llm.records import Budget, Comparison, ComparisonRow
from sglp_llm.trials import Journal
from sglp_llm.version import __version__

MEASURED = "measured"
"""The folder of the measured numbers, inside a comparison's folder."""

_PLANS = "plans"
# Settings that belong to single methods, or without influence on the numbers.
_IDLE = (
    "criterion also ratio drop target_params target_memory target_latency context compensate "
    "held_out candidates heal max_shard_size batch_size engine scratch journal"
)


def compare(
    opened: OpenedModel,
    calibration: CalibrationSet,
    recipe: Recipe,
    methods: Sequence[str],
    budgets: Sequence[Budget],
    measuring: Measuring,
    folder: Path,
    progress: Progress = silent,
    healing: HealingRecipe | None = None,
) -> Comparison:
    """Runs every method at every depth, and measures the shortened models in memory.

    All criteria that use hidden states or gradients share one pass. Methods that select alike select once; equal selections
    are compensated and measured once. Selections are kept in ``folder/journal`` and numbers in their own journal, from where
    an interrupted run resumes; every row's plan is in ``folder/plans``.

    Args:
        opened: The model.
        calibration: The sequences that the criteria and compensations see.
        recipe: Settings that all methods share; its criterion, budget and compensation are not used.
        methods: See `sglp_llm.comparison.methods.method_recipe`.
        budgets: Ratios or numbers of layers.
        measuring: What is measured, and how.
        folder: For the journal and the plans.
        progress: Reports the progress of every step.
        healing: How the models of methods that end in ``+heal`` are trained; the defaults are `HealingRecipe`'s.

    Raises:
        UserError: A method or budget does not fit.
    """
    recipes = checked_recipes(recipe, methods, budgets)
    protect = (recipe.protect.first, recipe.protect.last)
    for budget in budgets:
        check_budget(budget, opened.num_layers, protect, staying=opened.staying)
    check_compensations(recipes, opened, len(calibration.input_ids))
    settings = {**recipe.to_dict(), "calibration_hash": calibration.hash}
    for key in _IDLE.split():
        settings.pop(key, None)
    # Another version may store results in another form.
    model = {**opened.setting, "sglp-llm": __version__}
    dtype = measuring.dtype or recipe.dtype
    numbers = Journal(measuring.kept, {"dtype": dtype, **model})
    run = RunOfComparison(opened, calibration, Journal(folder / "journal", {**settings, **model}), folder, progress)

    judged = {each[0].judging_task: each[0] for each in recipes.values()}
    judges = {task: open_judge(each, opened) for task, each in judged.items()}
    choosers = {name: chooser(recipe, name, budgets[0]) for name in methods}
    own = {choosers[name]: [replace(each, compensate=NONE, heal=False) for each in recipes[name]] for name in methods}
    with naming_layers(opened.load, calibration.input_ids):
        chosen, seconds = choices(opened, calibration, recipe, own, run.journal, progress)
    plans = [
        (name, _decided(run, name, each, sets, judges[each.judging_task]))
        for name in methods
        for each, sets in zip(recipes[name], chosen[choosers[name]], strict=True)
    ]
    trainings = {name: training_of(each[0], name, healing) for name, each in recipes.items()}
    if any(trainings.values()):
        settings["healing"] = {name: each.to_dict() for name, each in trainings.items() if each}
        plans = [
            (name, plan if (training := trainings[name]) is None else trained_after(run, plan, training))
            for name, plan in plans
        ]
    dense = Shortened(())
    measured_model = opened
    if dtype != recipe.dtype:
        if opened.source is None:
            raise UserError("a live model is measured in its own dtype: save it, and compare the folder")
        settings["measure_dtype"] = dtype
        opened.release()
        measured_model = opened.alike(opened.source.path, dtype)
    found = measured(
        measured_model, [dense, *(plan.model for _, plan in plans)], measuring.measurements, numbers, progress
    )
    dense_losses = {name: each.losses for name, each in found[dense].items()}

    def results(model: Shortened) -> dict[str, dict[str, float]]:
        return {name: each.numbers | _gap(each.losses, dense_losses[name]) for name, each in found[model].items()}

    rows = tuple(
        ComparisonRow(
            method=name,
            ratio=round(len(plan.model.removed) / opened.num_layers, 4),
            removed=plan.model.removed,
            results=results(plan.model),
            losses={measurement: each.losses for measurement, each in found[plan.model].items()},
            plan=f"{_PLANS}/{plan.folder.name}",
            compensation_seconds=plan.seconds,
        )
        for name, plan in plans
    )
    single = [name for name in methods if is_single(recipes[name][0]) and not trainings[name]]
    if any(each[0].compensate != NONE for each in recipes.values()):
        settings |= {"held_out": recipe.held_out, "candidates": recipe.candidates}
    return Comparison(
        model=opened.identity.name,
        num_layers=opened.num_layers,
        dense=results(dense),
        dense_losses=dense_losses,
        rows=rows,
        pairs=pairs(rows, dense_losses, single),
        selection_seconds=seconds,
        settings=settings,
        versions=software_versions(),
    )


def checked_recipes(recipe: Recipe, methods: Sequence[str], budgets: Sequence[Budget]) -> dict[str, list[Recipe]]:
    """The settings of every method at every depth, after all checks that need no model.

    Raises:
        UserError: There is no method, one is given twice, unknown, or its settings do not fit; or an option is no method's.
    """
    if not methods:
        raise UserError("criteria: name at least one")
    if len(set(methods)) != len(methods):
        raise UserError(f"criteria: a name stands twice in {', '.join(methods)}")
    recipes = {name: [method_recipe(recipe, name, budget) for budget in budgets] for name in methods}
    for each in recipes.values():
        check_criteria(each[0])
    deciding = {each[0].deciding_criterion for each in recipes.values()}
    if idle := sorted(set(recipe.options) - deciding):
        raise UserError(f"options: {idle[0]} is not among the criteria of this run ({', '.join(sorted(deciding))})")
    return recipes


def check_compensations(recipes: Mapping[str, list[Recipe]], opened: OpenedModel, samples: int) -> None:
    """Refuses, before any text is read, a method whose compensation does not fit the model.

    Args:
        recipes: See `checked_recipes`.
        opened: The model.
        samples: Number of calibration sequences.

    Raises:
        UserError: A compensation does not fit.
    """
    for each in recipes.values():
        check_compensation(each[0].compensate, opened.adapter, opened.text_config, samples)


def _decided(
    run: RunOfComparison, method: str, recipe: Recipe, sets: Sequence[Sequence[int]], judge: Judge | None
) -> DecidedRow:
    """Takes a method's best set of layers at one depth, with its compensation if it has one, and saves the plan.

    Args:
        run: What all methods share.
        method: Name of the method.
        recipe: Its settings at this depth.
        sets: The candidate sets of its criterion, see `sglp_llm.analysis.decisions.finalists`.
        judge: Scores them, where the criterion's objective is a task.
    """
    single = recipe.compensate == NONE and judge is None
    sets = [list(each) for each in sets[: 1 if single else recipe.candidates]]
    how = "" if recipe.compensate == NONE else f" repaired by {recipe.compensate}, {recipe.held_out} held out"
    how += "" if judge is None else f", scored on {recipe.judging_task}"
    what = f"the best of {sets}{how}"
    folder = run.folder / _PLANS / f"{hashlib.sha256(what.encode()).hexdigest()[:8]}-{method}"

    def save(removed: Sequence[int], replaced: Mapping[str, torch.Tensor], report: Mapping[str, Any]) -> None:
        plan = replace(
            plan_from_indices(run.opened.num_layers, removed),
            source=run.opened.identity,
            revision=run.opened.revision,
            budget=recipe.budget.to_dict(),
            settings={**plan_settings(recipe, removed), "calibration_hash": run.calibration.hash},
            versions=software_versions(),
            replaced=replaced,
            compensation=report,
        )
        folder.mkdir(parents=True, exist_ok=True)
        save_plan(plan, folder / PLAN_FILE_NAME)

    if single:
        save(sets[0], {}, {})
        return DecidedRow(Shortened(tuple(sorted(sets[0]))), folder, 0.0)

    def repaired() -> dict[str, Any]:
        start = time.perf_counter()
        removed, found = repair_best(run.opened, recipe, run.calibration, sets, run.progress, judge=judge)
        # What is measured is what an export would hold.
        replaced = as_stored(run.opened.config, run.opened.source, found.replaced)
        save(removed, replaced, found.report)
        seconds = time.perf_counter() - start
        return {"removed": removed, "folder": folder.name, "tensors": _digest(replaced), "seconds": seconds}

    kept = run.journal.once(what, repaired)
    first = run.folder / _PLANS / kept["folder"]
    if first != folder:
        known = load_plan(first)
        save(kept["removed"], known.replaced, known.compensation)
    return DecidedRow(Shortened(tuple(sorted(kept["removed"])), kept["tensors"], first), folder, kept["seconds"])


def _digest(replaced: Mapping[str, torch.Tensor]) -> str:
    """A digest of the tensors and their names; empty when there are none."""
    digest = hashlib.sha256()
    for name, tensor in sorted(replaced.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] if replaced else ""


def _gap(losses: Sequence[float], dense: Sequence[float]) -> dict[str, float]:
    """How far a model's log perplexity is above the dense model's, with the standard error of the paired differences."""
    if not losses:
        return {}
    gap, error = paired_difference(losses, dense)
    return {"log_gap": gap, "log_gap_standard_error": error}
