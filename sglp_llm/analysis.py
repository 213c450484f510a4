"""From a model and calibration sequences to a plan: observe once, then choose layers for any criterion and budget."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sglp_llm.calibration import CalibrationSet
from sglp_llm.compensation import NONE, Compensated, Method, get_method
from sglp_llm.criteria import Criterion, ScoreCriterion, SetCriterion, criterion_names, get_criterion, make_criterion
from sglp_llm.engine.observer import Need
from sglp_llm.engine.passes import run_pass
from sglp_llm.engine.representations import CKAObserver
from sglp_llm.engine.trials import Trials
from sglp_llm.errors import UserError
from sglp_llm.journal import Journal
from sglp_llm.loading import DecoderModel
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent
from sglp_llm.recipe import Recipe
from sglp_llm.records import Analysis, PrunePlan, Segment, SimilarityMatrix
from sglp_llm.segmentation import segment_layers
from sglp_llm.selection import layers_to_remove, removable_layers, set_to_remove
from sglp_llm.subject import Subject
from sglp_llm.version import __version__

SGLP = "sglp"
"""The paper's pipeline: CKA segments, and GradNorm inside them."""

CKA_COLUMN_SUM = "cka_column_sum"

_CANDIDATE_SAMPLES = 16
"""Sequences on which the sets that a search ends with are repaired, so that one of them can be taken."""


@dataclass(frozen=True)
class Observations:
    """What one pass over the calibration set, and the trials after it, have shown.

    Attributes:
        criteria: The criteria that watched, by name.
        similarity: The CKA matrix; ``None`` when nobody needed it.
        loss: Mean loss of the calibration sequences in nats a token; ``None`` when no gradients were taken.
    """

    criteria: Mapping[str, Criterion]
    similarity: SimilarityMatrix | None
    loss: float | None

    def scores(self) -> dict[str, tuple[float, ...]]:
        """One number a layer from each criterion that gives scores, and the column sums of the CKA matrix.

        Raises:
            UserError: A score is not finite.
        """
        scores = {
            name: _finite(name, criterion.scores())
            for name, criterion in self.criteria.items()
            if isinstance(criterion, ScoreCriterion)
        }
        if self.similarity is not None:
            scores[CKA_COLUMN_SUM] = tuple(self.similarity.column_sums)
        return scores


def deciding_criterion(recipe: Recipe) -> str:
    """The criterion whose verdict decides: ``sglp`` is CKA segments with GradNorm inside them."""
    return "gradnorm" if recipe.criterion == SGLP else recipe.criterion


def is_segmented(recipe: Recipe) -> bool:
    """Whether layers are compared inside CKA segments only."""
    return recipe.criterion == SGLP if recipe.segments is None else recipe.segments


def check_criteria(recipe: Recipe) -> None:
    """Refuses, before any work is done, criteria and options that do not exist or do not fit together.

    Raises:
        UserError: One does not.
    """
    names = (deciding_criterion(recipe), *recipe.also)
    for name in (*names, *recipe.options):
        make_criterion(name, 1, recipe.seed, recipe.options.get(name))
    if idle := [name for name in recipe.options if name not in names]:
        raise UserError(f"options: {idle[0]} is not among the criteria of this run ({', '.join(names)})")
    if is_segmented(recipe) and issubclass(get_criterion(deciding_criterion(recipe)), SetCriterion):
        raise UserError(f"{recipe.criterion} gives a set of layers, not scores: it cannot be used inside segments")


def check_journal(recipe: Recipe) -> None:
    """Refuses, before any work is done, a journal that nothing would be written in.

    Raises:
        UserError: No criterion of the run keeps its trials.
    """
    names = (deciding_criterion(recipe), *recipe.also)
    if recipe.journal is not None and not any(get_criterion(name).keeps_trials for name in names):
        keeping = [name for name in criterion_names() if get_criterion(name).keeps_trials]
        raise UserError(
            f"journal keeps the trials of {', '.join(keeping)}; this run has {recipe.criterion}: leave it out"
        )


def observe(
    model: DecoderModel,
    calibration: CalibrationSet,
    recipe: Recipe,
    names: Sequence[str],
    similarity: bool,
    progress: Progress = silent,
    processes: Processes = ALONE,
    journal: Journal | None = None,
) -> Observations:
    """Runs the union of what the criteria need once, and then each criterion's own trials.

    Args:
        model: The model.
        calibration: The sequences.
        recipe: For the settings; its criterion and budget are not used.
        names: The criteria.
        similarity: Whether the CKA matrix is wanted.
        progress: Told the sequences that are done.
        processes: Those that share the sequences; all return the same.
        journal: Keeps the trials of criteria that can go on from them.
    """
    criteria = {
        name: make_criterion(name, model.num_layers, recipe.seed, recipe.options.get(name))
        for name in dict.fromkeys(names)
    }
    cka = CKAObserver(model.num_layers, recipe.kernel, recipe.minibatch_sequences, recipe.minibatch_positions)
    observers = [*criteria.values(), *([cka] if similarity else [])]
    loss = run_pass(model, calibration, observers, batch_size=recipe.batch_size, progress=progress, processes=processes)
    trials = Trials(
        model, calibration.first(recipe.trial_samples), progress=progress, processes=processes, journal=journal
    )
    for criterion in criteria.values():
        if Need.TRIALS in criterion.needs:
            criterion.on_trials(trials)
    return Observations(criteria, cka.result() if similarity else None, loss)


def choose_layers(
    recipe: Recipe, model: DecoderModel, observations: Observations
) -> tuple[tuple[int, ...], tuple[Segment, ...]]:
    """The layers that the recipe's criterion removes for the recipe's budget, and the segments it looked at.

    Returns:
        The layers in the criterion's own order, and the segments (one of all layers without segmentation).

    Raises:
        UserError: The budget cannot be met.
    """
    criterion = observations.criteria[deciding_criterion(recipe)]
    protect = (recipe.protect.first, recipe.protect.last)
    segments: tuple[Segment, ...] = (Segment(0, model.num_layers),)
    if is_segmented(recipe):
        assert observations.similarity is not None
        k = None if recipe.num_segments == "auto" else recipe.num_segments
        segments = segment_layers(observations.similarity, k, recipe.features, recipe.min_drop)
    if isinstance(criterion, SetCriterion):
        left = model.parameters_without
        return set_to_remove(recipe.budget, model.num_layers, criterion.choose, protect, left), segments
    scores = observations.scores()[deciding_criterion(recipe)]
    return layers_to_remove(recipe.budget, segments, scores, protect, model.parameters_without), segments


def compensate(
    subject: Subject,
    recipe: Recipe,
    calibration: CalibrationSet,
    removed: Sequence[int],
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> Compensated:
    """What the recipe's compensation makes of the layers that stay; nothing without one.

    Args:
        subject: The model.
        recipe: For ``compensate``, ``held_out`` and ``batch_size``.
        calibration: The sequences.
        removed: The layers that go.
        progress: Told how far it is.
        processes: Those that share the sequences; all return the same.

    Raises:
        UserError: The method does not fit the model, or hidden states or losses are not finite.
    """
    if recipe.compensate == NONE:
        return Compensated({}, {})
    return _repaired(get_method(recipe.compensate), subject, recipe, calibration, removed, progress, processes)


def _repaired(
    method: Method,
    subject: Subject,
    recipe: Recipe,
    calibration: CalibrationSet,
    removed: Sequence[int],
    progress: Progress,
    processes: Processes,
) -> Compensated:
    return method.run(
        subject.load(),
        calibration,
        removed,
        held_out=recipe.held_out,
        stored=subject.stored_dtype,
        batch_size=recipe.batch_size,
        progress=progress,
        processes=processes,
    )


@dataclass(frozen=True)
class Decision:
    """Which layers go, and what makes up for them.

    Attributes:
        removed: In the criterion's own order.
        segments: What the criterion looked at, see `choose_layers`.
        compensated: New values of what stays, and the report.
    """

    removed: tuple[int, ...]
    segments: tuple[Segment, ...]
    compensated: Compensated


def decide(
    subject: Subject,
    recipe: Recipe,
    calibration: CalibrationSet,
    observations: Observations,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> Decision:
    """Chooses layers and repairs the cuts: together, where the criterion ends with more than one good set.

    The best set before the repair need not be the best after it: each of the first ``recipe.candidates`` is repaired in closed
    form on some of the sequences, and the one with the least loss on those held out is taken.

    Raises:
        UserError: See `choose_layers` and `compensate`.
    """
    model = subject.load()
    removed, segments = choose_layers(recipe, model, observations)
    sets = [removed] if recipe.compensate == NONE else finalists(recipe, model, observations, removed)
    removed, compensated = repair_best(subject, recipe, calibration, sets, progress, processes)
    return Decision(removed, segments, compensated)


def finalists(
    recipe: Recipe, model: DecoderModel, observations: Observations, removed: Sequence[int]
) -> list[tuple[int, ...]]:
    """The good sets that the recipe's criterion ends with, what `choose_layers` gave first; most criteria know that one only."""
    criterion = observations.criteria[deciding_criterion(recipe)]
    if not isinstance(criterion, SetCriterion):
        return [tuple(removed)]
    among = removable_layers(model.num_layers, (recipe.protect.first, recipe.protect.last))
    return [tuple(removed), *(tuple(sorted(each)) for each in criterion.runners_up(len(removed), among))]


def repair_best(
    subject: Subject,
    recipe: Recipe,
    calibration: CalibrationSet,
    sets: Sequence[Sequence[int]],
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> tuple[tuple[int, ...], Compensated]:
    """The set of layers that goes, and what makes up for it; see `decide`.

    Args:
        subject: The model.
        recipe: For ``candidates`` and what `compensate` looks at.
        calibration: The sequences.
        sets: The good sets, the best before the repair first; at least one.
        progress: Told how far it is.
        processes: Those that share the sequences; all return the same.

    Raises:
        UserError: See `compensate`.
    """
    removed = tuple(sets[0])
    candidates = sets[: recipe.candidates] if recipe.compensate != NONE else []
    judged: list[dict[str, Any]] = []
    if len(candidates) > 1:
        few = calibration.first(_CANDIDATE_SAMPLES)
        method = get_method(recipe.compensate).closed_form(subject.load())
        for each in candidates:
            report = _repaired(method, subject, recipe, few, each, progress, processes).report
            loss = report["losses"].get("held_out", {}).get("with")  # nothing is in front of a cut of the first layers
            judged.append({"removed": list(each), "held_out_loss": loss})
        best = min(judged, key=lambda one: (one["held_out_loss"] is None, one["held_out_loss"]))
        removed = tuple(best["removed"])
    compensated = compensate(subject, recipe, calibration, removed, progress, processes)
    if judged:
        compensated = Compensated(compensated.replaced, {**compensated.report, "candidates": judged})
    return removed, compensated


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
        "model": subject.identity.name,  # the fingerprint does not tell two fine-tuned copies apart
        "fingerprint": subject.identity.fingerprint,
        "revision": subject.revision,
        "dtype": recipe.dtype,
        "calibration_hash": calibration.hash,
        "versions": software_versions(),
    }
    return Journal(Path(recipe.journal).expanduser() / "trials", setting)


def software_versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    libraries = {name: version(name) for name in ("torch", "transformers")}
    return {"sglp-llm": __version__, **libraries, "python": platform.python_version()}


def _finite(name: str, scores: Sequence[float]) -> tuple[float, ...]:
    for layer, score in enumerate(scores):
        if not math.isfinite(score):
            raise UserError(
                f"the {name} score of decoder layer {layer} is not finite ({score}): are the weights damaged, "
                "or is the dtype too small (try --dtype float32)?"
            )
    return tuple(scores)
