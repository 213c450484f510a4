"""Runs one pass over the calibration set, and the trials after it, for any criteria."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sglp_llm.calibration import CalibrationSet
from sglp_llm.criteria import Criterion, ScoreCriterion, SetCriterion, criterion_names, get_criterion, make_criterion
from sglp_llm.engine import Need, PassSettings, run_pass
from sglp_llm.engine.representations import CKAObserver
from sglp_llm.errors import UserError
from sglp_llm.method.staying import FREE, Staying
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import has_fast_bfloat16
from sglp_llm.models.staying import staying_of
from sglp_llm.plan import Recipe
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent
from sglp_llm.records import SimilarityMatrix
from sglp_llm.trials import Journal, Trials

CKA_COLUMN_SUM = "cka_column_sum"


@dataclass(frozen=True)
class Observations:
    """The results of one pass over the calibration set and the trials after it.

    Attributes:
        criteria: The criteria that observed the pass, by name.
        similarity: The CKA matrix; ``None`` when it was not requested.
        loss: Mean loss of the calibration sequences in nats per token; ``None`` when no gradients were computed.
        staying: Which layers must stay.
    """

    criteria: Mapping[str, Criterion]
    similarity: SimilarityMatrix | None
    loss: float | None
    staying: Staying = FREE

    def scores(self) -> dict[str, tuple[float, ...]]:
        """One number per layer from each criterion that gives scores, and the column sums of the CKA matrix.

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


def check_criteria(recipe: Recipe) -> None:
    """Refuses, before any work is done, criteria and options that do not exist or do not fit together.

    Raises:
        UserError: A criterion or option is unknown, or does not fit.
    """
    names = (recipe.deciding_criterion, *recipe.also)
    for name in (*names, *recipe.options):
        make_criterion(name, 1, recipe.seed, recipe.options.get(name))
    if idle := [name for name in recipe.options if name not in names]:
        raise UserError(f"options: {idle[0]} is not among the criteria of this run ({', '.join(names)})")
    if recipe.is_segmented and issubclass(get_criterion(recipe.deciding_criterion), SetCriterion):
        raise UserError(f"{recipe.criterion} gives a set of layers, not scores: it cannot be used inside segments")


def trials_in_bfloat16(recipe: Recipe, model: DecoderModel) -> bool:
    """Whether numbers that only rank removals and compensations are computed in bfloat16 although the model is not."""
    on_cpu_in_float32 = model.input_device.type == "cpu" and model.model.dtype == torch.float32
    return recipe.trial_dtype == "auto" and on_cpu_in_float32 and has_fast_bfloat16()


def check_journal(recipe: Recipe) -> None:
    """Refuses, before any work is done, a journal that no criterion of the run would write to.

    Raises:
        UserError: No criterion of the run keeps its trials.
    """
    names = (recipe.deciding_criterion, *recipe.also)
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
    step: int | None = None,
) -> Observations:
    """Runs one pass that shows all criteria what they need, and then each criterion's own trials.

    Args:
        model: The model.
        calibration: The sequences.
        recipe: For the settings; its criterion and budget are not used.
        names: The criteria.
        similarity: Whether to compute the CKA matrix.
        progress: Reports finished sequences.
        processes: The processes that share the sequences; all return the same result.
        journal: Keeps the trials of criteria that can resume from them.
        step: Most sequences a step of a pass with gradients; ``None`` = the recipe's ``batch_size``.
    """
    criteria = {
        name: make_criterion(name, model.num_layers, recipe.seed, recipe.options.get(name))
        for name in dict.fromkeys(names)
    }
    limits = staying_of(model.model.config, model.adapter, model.num_layers)
    for criterion in criteria.values():
        if isinstance(criterion, SetCriterion):
            criterion.staying = limits
    cka = CKAObserver(model.num_layers, recipe.kernel, recipe.minibatch_sequences, recipe.minibatch_positions)
    observers = [*criteria.values(), *([cka] if similarity else [])]
    settings = PassSettings(recipe.batch_size, progress, processes, gradient_batch=step)
    loss = run_pass(model, calibration, observers, settings)
    trials = Trials(
        model,
        calibration.first(recipe.trial_samples),
        progress=progress,
        processes=processes,
        journal=journal,
        bfloat16=trials_in_bfloat16(recipe, model),
    )
    for criterion in criteria.values():
        if Need.TRIALS in criterion.needs:
            criterion.on_trials(trials)
    return Observations(criteria, cka.result() if similarity else None, loss, limits)


def _finite(name: str, scores: Sequence[float]) -> tuple[float, ...]:
    for layer, score in enumerate(scores):
        if not math.isfinite(score):
            raise UserError(
                f"the {name} score of decoder layer {layer} is not finite ({score}): are the weights damaged, "
                "or is the dtype too small (try --dtype float32)?"
            )
    return tuple(scores)
