"""The analysis: runs the criteria on the calibration set, chooses layers, and records everything in a plan."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sglp_llm.analysis.decisions import Judge, check_reachable, decide
from sglp_llm.analysis.observing import observe, trials_in_bfloat16
from sglp_llm.analysis.opening import Inputs
from sglp_llm.calibration import CalibrationSet
from sglp_llm.checkpoint.lock import LOCK_FILE_NAME, only_run
from sglp_llm.checkpoint.shorten import check_shortened
from sglp_llm.compensation import NONE
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import Recipe
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent
from sglp_llm.records import Analysis, PrunePlan
from sglp_llm.trials import Journal
from sglp_llm.version import __version__


def run_analysis(
    inputs: Inputs,
    recipe: Recipe,
    progress: Progress = silent,
    processes: Processes = ALONE,
    judge: Judge | None = None,
) -> Analysis:
    """Runs the criteria, chooses the layers to remove, and compensates for them.

    Args:
        inputs: The model and the calibration set.
        recipe: The settings.
        progress: Reports progress.
        processes: The processes that share the sequences; all return the same result.
        judge: See `sglp_llm.analysis.decisions.repair_best`.

    Raises:
        UserError: The budget cannot be met, hidden states or losses are not finite, or the layers cannot be removed together.
    """
    opened, calibration = inputs.model, inputs.calibration
    assert calibration is not None
    processes.check_same("model", opened.identity.fingerprint)
    processes.check_same("calibration set", calibration.hash)
    journal = _journal(opened, recipe, calibration)
    model = opened.load()
    check_reachable(recipe, opened.footprint(), opened.staying)
    names = (recipe.deciding_criterion, *recipe.also)
    observations = observe(
        model, calibration, recipe, names, recipe.is_segmented, progress, processes, journal, inputs.step
    )
    scores = observations.scores()
    decision = decide(opened, recipe, calibration, observations, progress, processes, judge)
    removed, segments, compensated = decision.removed, decision.segments, decision.compensated
    kept = tuple(layer for layer in range(model.num_layers) if layer not in removed)
    check_shortened(opened, kept)
    settings = {**plan_settings(recipe, removed), "calibration_hash": calibration.hash}
    if opened.adapter.is_derived:
        settings["adapter"] = "derived"
    if opened.staying:
        settings["staying"] = opened.staying.to_dict()
    for name, criterion in observations.criteria.items():
        if report := criterion.report():
            assert name not in settings
            settings[name] = dict(report)
    plan = PrunePlan(
        num_layers=model.num_layers,
        kept=kept,
        source=opened.identity,
        revision=opened.revision,
        segments=segments,
        scores=scores,
        similarity=observations.similarity or observations.criteria[recipe.deciding_criterion].cka,
        footprint=opened.footprint(),
        budget=recipe.budget.to_dict(),
        settings=settings,
        versions=software_versions(),
        replaced=compensated.replaced,
        compensation=compensated.report,
    )
    return Analysis(plan, observations.loss)


def plan_settings(recipe: Recipe, removed: Sequence[int]) -> dict[str, Any]:
    """The recipe that led to a plan, for `PrunePlan.settings`; the budget has a field of its own.

    Args:
        recipe: All settings.
        removed: The removed layers, in the order in which the criterion removes them.
    """
    settings = {**recipe.to_dict(), "scored_by": recipe.deciding_criterion}
    # Recorded elsewhere, about the export only, or without influence on the plan.
    idle = ("held_out", "candidates") if recipe.compensate == NONE else ()
    for key in (
        "model",
        "revision",
        "heal",
        "max_shard_size",
        "engine",
        "scratch",
        "journal",
        *idle,
        *recipe.budget.to_dict(),
    ):
        settings.pop(key, None)
    if list(removed) != sorted(removed):
        settings["removal_order"] = list(removed)
    return settings


def _journal(opened: OpenedModel, recipe: Recipe, calibration: CalibrationSet) -> Journal | None:
    """The journal of the run's trials, valid for this model and these sequences and for any budget; ``None`` without one.

    Raises:
        UserError: The folder holds trials of another model or other sequences.
    """
    if recipe.journal is None:
        return None
    setting = {
        **opened.setting,
        "dtype": recipe.dtype,
        "calibration_hash": calibration.hash,
        "versions": software_versions(),
        **({"trial_dtype": "bfloat16"} if trials_in_bfloat16(recipe, opened.load()) else {}),
    }
    return Journal(Path(recipe.journal).expanduser() / "trials", setting)


def only_journal(recipe: Recipe, processes: Processes) -> AbstractContextManager[None]:
    """A block in which no other run uses the recipe's journal.

    Raises:
        UserError: Another run uses it, or it cannot be written to.
    """
    if recipe.journal is None or not processes.is_main:
        return nullcontext()
    folder = Path(recipe.journal).expanduser()
    return only_run(folder / LOCK_FILE_NAME, folder)


def software_versions() -> dict[str, str]:
    """Versions of the software that a result may depend on."""
    libraries = {name: version(name) for name in ("torch", "transformers")}
    return {"sglp-llm": __version__, **libraries, "python": platform.python_version()}
