"""From a model and calibration sequences to a plan: observe once, then choose layers and write down why."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sglp_llm.calibration import CalibrationSet
from sglp_llm.compensation import NONE
from sglp_llm.decisions import decide
from sglp_llm.journal import Journal
from sglp_llm.observing import deciding_criterion, is_segmented, observe
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress
from sglp_llm.recipe import Recipe
from sglp_llm.records import Analysis, PrunePlan
from sglp_llm.subject import Subject
from sglp_llm.version import __version__


def run_analysis(
    subject: Subject,
    recipe: Recipe,
    calibration: CalibrationSet,
    progress: Progress,
    processes: Processes = ALONE,
) -> Analysis:
    """Observes, chooses, and writes down why."""
    processes.check_same("model", subject.identity.fingerprint)
    processes.check_same("calibration set", calibration.hash)
    journal = _journal(subject, recipe, calibration)
    model = subject.load()
    names = (deciding_criterion(recipe), *recipe.also)
    observations = observe(model, calibration, recipe, names, is_segmented(recipe), progress, processes, journal)
    scores = observations.scores()
    decision = decide(subject, recipe, calibration, observations, progress, processes)
    removed, segments, compensated = decision.removed, decision.segments, decision.compensated
    settings = plan_settings(recipe, calibration, removed)
    for name, criterion in observations.criteria.items():
        if report := criterion.report():
            assert name not in settings
            settings[name] = dict(report)
    plan = PrunePlan(
        num_layers=model.num_layers,
        kept=tuple(layer for layer in range(model.num_layers) if layer not in removed),
        source=subject.identity,
        revision=subject.revision,
        segments=segments,
        scores=scores,
        budget=recipe.budget.to_dict(),
        settings=settings,
        versions=software_versions(),
        replaced=compensated.replaced,
        compensation=compensated.report,
    )
    left = model.parameters_without(removed)
    return Analysis(plan, observations.similarity, observations.loss, model.num_parameters, left)


def plan_settings(recipe: Recipe, calibration: CalibrationSet, removed: Sequence[int]) -> dict[str, Any]:
    """The settings that led to a plan, for `PrunePlan.settings`; the budget stands beside them.

    Args:
        recipe: All settings.
        calibration: The sequences.
        removed: The layers that go, in the order in which the criterion removes them.
    """
    settings = {**recipe.to_dict(), "calibration_hash": calibration.hash, "scored_by": deciding_criterion(recipe)}
    # Said elsewhere, of the export, or without influence on the plan.
    idle = ("held_out", "candidates") if recipe.compensate == NONE else ()
    for key in ("model", "revision", "max_shard_size", "engine", "scratch", "journal", *idle, *recipe.budget.to_dict()):
        settings.pop(key, None)
    if list(removed) != sorted(removed):
        settings["removal_order"] = list(removed)
    return settings


def _journal(subject: Subject, recipe: Recipe, calibration: CalibrationSet) -> Journal | None:
    """Where the trials of an interrupted run are kept: of this model on these sequences, for any budget.

    Raises:
        UserError: The folder holds those of another model or other sequences.
    """
    if recipe.journal is None:
        return None
    setting = {
        **subject.setting,
        "dtype": recipe.dtype,
        "calibration_hash": calibration.hash,
        "versions": software_versions(),
    }
    return Journal(Path(recipe.journal).expanduser() / "trials", setting)


def software_versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    libraries = {name: version(name) for name in ("torch", "transformers")}
    return {"sglp-llm": __version__, **libraries, "python": platform.python_version()}
