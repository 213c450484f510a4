"""Chooses the layers to remove from the observations, and compensates for them; for any criterion and budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sglp_llm.analysis.observing import Observations, trials_in_bfloat16
from sglp_llm.analysis.targets import wanted
from sglp_llm.calibration import CalibrationSet
from sglp_llm.compensation import NONE, Compensated, FitSettings, Method, get_method
from sglp_llm.criteria import SetCriterion, criterion_names, get_criterion
from sglp_llm.errors import UserError
from sglp_llm.method.segmentation import segment_layers
from sglp_llm.method.selection import (
    Target,
    check_budget,
    check_target,
    layers_to_remove,
    number_to_remove,
    removable_layers,
    set_to_remove,
)
from sglp_llm.method.staying import FREE, Staying
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import Recipe
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent
from sglp_llm.records import Footprint, Segment, SimilarityMatrix

Judge = Callable[[Sequence[int], Mapping[str, torch.Tensor]], float]
"""Scores the model without these layers and with these parameters replaced; more is better."""

_CANDIDATE_SAMPLES = 32
"""Sequences on which the candidate sets of a search are compensated, to take the best of them."""
_CANDIDATE_HELD_OUT = 0.25
"""Least share of these that is held out to compare the sets: the loss of only a few sequences is mostly noise."""


def check_selection(recipe: Recipe, num_layers: int, staying: Staying = FREE) -> None:
    """Rejects, before any work is done, a number of segments or a budget that does not fit a model of this depth.

    Raises:
        UserError: One does not.
    """
    if _segments(recipe) > num_layers:
        raise UserError(
            f"num_segments: {recipe.num_segments} segments are more than the model's {num_layers} decoder layers"
        )
    check_budget(recipe.budget, num_layers, _protect(recipe), _segments(recipe), staying)
    if not staying or recipe.deciding_criterion not in criterion_names():  # the scores may be another program's
        return
    criterion, said = get_criterion(recipe.deciding_criterion), f"criterion {recipe.deciding_criterion}"
    if not issubclass(criterion, SetCriterion):
        return
    if staying.pattern[0] and not criterion.contiguous:
        raise UserError(
            f"{said} removes one layer after the other, and {staying.pattern[1]}: take a criterion that gives scores (such as "
            "sglp or bi) or angular, or choose layers yourself, with --plan"
        )
    if criterion.contiguous and (recipe.budget.ratio is not None or recipe.budget.drop is not None):
        among = removable_layers(num_layers, _protect(recipe), staying)
        staying.windows(number_to_remove(recipe.budget, num_layers, len(among), staying), among, said)


def check_reachable(recipe: Recipe, footprint: Footprint, staying: Staying = FREE) -> None:
    """Rejects, before layers are scored, a target that the whole model reaches, or that no choice of layers can reach.

    Raises:
        UserError: See `check_target`.
    """
    target = wanted(recipe, footprint)
    if isinstance(target, Target):
        check_target(target, len(footprint.layers), _protect(recipe), _segments(recipe), staying)


def choose_layers(
    recipe: Recipe, footprint: Footprint, observations: Observations
) -> tuple[tuple[int, ...], tuple[Segment, ...]]:
    """Chooses the layers to remove, by the recipe's criterion and budget.

    Returns:
        The layers, in the order in which the criterion removes them, and the segments (a single one without segmentation).

    Raises:
        UserError: The budget cannot be met.
    """
    criterion = observations.criteria[recipe.deciding_criterion]
    if not isinstance(criterion, SetCriterion):
        scores = observations.scores()[recipe.deciding_criterion]
        return choose_by_scores(recipe, scores, observations.similarity, footprint, observations.staying)
    num_layers = len(footprint.layers)
    removed = set_to_remove(
        wanted(recipe, footprint), num_layers, criterion.choose, _protect(recipe), observations.staying
    )
    return removed, (Segment(0, num_layers),)


def choose_by_scores(
    recipe: Recipe,
    scores: Sequence[float],
    similarity: SimilarityMatrix | None,
    footprint: Footprint | None,
    staying: Staying = FREE,
) -> tuple[tuple[int, ...], tuple[Segment, ...]]:
    """The choice of `choose_layers` for a criterion that gives scores.

    Args:
        recipe: For the budget, the segments and the protected layers.
        scores: The deciding criterion's, one per layer.
        similarity: The CKA matrix; needed with segments only.
        footprint: What the model takes in memory; needed with a target only.
        staying: Which layers must stay.

    Raises:
        UserError: The budget cannot be met.
    """
    segments: tuple[Segment, ...] = (Segment(0, len(scores)),)
    if recipe.is_segmented:
        assert similarity is not None
        k = None if recipe.num_segments == "auto" else recipe.num_segments
        segments = segment_layers(similarity, k, recipe.features, recipe.min_drop, recipe.segments_rule)
    return layers_to_remove(wanted(recipe, footprint), segments, scores, _protect(recipe), staying), segments


def _protect(recipe: Recipe) -> tuple[int, int]:
    return recipe.protect.first, recipe.protect.last


def _segments(recipe: Recipe) -> int:
    """The least number of segments."""
    return recipe.num_segments if isinstance(recipe.num_segments, int) and recipe.is_segmented else 1


def compensate(
    opened: OpenedModel,
    recipe: Recipe,
    calibration: CalibrationSet,
    removed: Sequence[int],
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> Compensated:
    """Runs the recipe's compensation on the kept layers; the result is empty without one.

    Args:
        opened: The model.
        recipe: For ``compensate``, ``held_out`` and ``batch_size``.
        calibration: The sequences.
        removed: The layers to remove.
        progress: Reports progress.
        processes: The processes that share the sequences; all return the same result.

    Raises:
        UserError: The method does not fit the model, or hidden states or losses are not finite.
    """
    if recipe.compensate == NONE:
        return Compensated({}, {})
    return _repaired(get_method(recipe.compensate), opened, recipe, calibration, removed, progress, processes)


def _repaired(
    method: Method,
    opened: OpenedModel,
    recipe: Recipe,
    calibration: CalibrationSet,
    removed: Sequence[int],
    progress: Progress,
    processes: Processes,
) -> Compensated:
    model = opened.load()
    rounded = trials_in_bfloat16(recipe, model)
    settings = FitSettings(recipe.held_out, opened.stored_dtype, recipe.batch_size, progress, processes, rounded)
    return method.run(model, calibration, removed, settings)


@dataclass(frozen=True)
class Decision:
    """Which layers are removed, and the compensation for them.

    Attributes:
        removed: In the order in which the criterion removes them.
        segments: The segments that were used, see `choose_layers`.
        compensated: New values of parameters of kept layers, and the report.
    """

    removed: tuple[int, ...]
    segments: tuple[Segment, ...]
    compensated: Compensated


def decide(
    opened: OpenedModel,
    recipe: Recipe,
    calibration: CalibrationSet,
    observations: Observations,
    progress: Progress = silent,
    processes: Processes = ALONE,
    judge: Judge | None = None,
) -> Decision:
    """Chooses the layers to remove and compensates for them, comparing several sets where the criterion gives more than one.

    The best set before compensation need not be the best after it: each of the first ``recipe.candidates`` sets is compensated
    in closed form on some of the sequences, and the one with the lowest loss on the held-out sequences is taken, or with the
    highest score where there is a judge.

    Raises:
        UserError: See `choose_layers` and `compensate`.
    """
    removed, segments = choose_layers(recipe, opened.footprint(), observations)
    single = recipe.compensate == NONE and judge is None
    sets = [removed] if single else finalists(recipe, opened.num_layers, observations, removed)
    removed, compensated = repair_best(opened, recipe, calibration, sets, progress, processes, judge)
    return Decision(removed, segments, compensated)


def finalists(
    recipe: Recipe, num_layers: int, observations: Observations, removed: Sequence[int]
) -> list[tuple[int, ...]]:
    """The candidate sets of the recipe's criterion: first the choice of `choose_layers`, then runners-up, if it has any."""
    criterion = observations.criteria[recipe.deciding_criterion]
    if not isinstance(criterion, SetCriterion):
        return [tuple(removed)]
    among = removable_layers(num_layers, _protect(recipe), observations.staying)
    return [tuple(removed), *(tuple(sorted(each)) for each in criterion.runners_up(len(removed), among))]


def repair_best(
    opened: OpenedModel,
    recipe: Recipe,
    calibration: CalibrationSet,
    sets: Sequence[Sequence[int]],
    progress: Progress = silent,
    processes: Processes = ALONE,
    judge: Judge | None = None,
) -> tuple[tuple[int, ...], Compensated]:
    """The set of layers that is best after compensation, and its compensation; see `decide`.

    Args:
        opened: The model.
        recipe: For ``candidates`` and what `compensate` uses.
        calibration: The sequences.
        sets: The candidate sets, the best before compensation first; at least one.
        progress: Reports progress.
        processes: The processes that share the sequences; all return the same result.
        judge: Scores the candidates after their compensation; ``None`` = by the loss on the held-out sequences.

    Raises:
        UserError: See `compensate`.
    """
    removed = tuple(sets[0])
    candidates = sets[: recipe.candidates] if recipe.compensate != NONE or judge is not None else []
    judged: list[dict[str, Any]] = []
    if len(candidates) > 1:
        few = calibration.first(_CANDIDATE_SAMPLES)
        judging = replace(recipe, held_out=max(recipe.held_out, _CANDIDATE_HELD_OUT))
        method = None if recipe.compensate == NONE else get_method(recipe.compensate).closed_form(opened.load())
        for each in candidates:
            repaired = Compensated({}, {})
            if method is not None:
                repaired = _repaired(method, opened, judging, few, each, progress, processes)
            if judge is not None:
                judged.append({"removed": list(each), "score": judge(each, repaired.replaced)})
                continue
            loss = (
                repaired.report.get("losses", {}).get("held_out", {}).get("with")
            )  # none where only the first layers go
            judged.append({"removed": list(each), "held_out_loss": loss})
        if judge is not None:
            best = max(judged, key=lambda one: one["score"])
        else:
            best = min(judged, key=lambda one: (one["held_out_loss"] is None, one["held_out_loss"]))
        removed = tuple(best["removed"])
    compensated = compensate(opened, recipe, calibration, removed, progress, processes)
    if judged:
        compensated = Compensated(compensated.replaced, {**compensated.report, "candidates": judged})
    return removed, compensated
