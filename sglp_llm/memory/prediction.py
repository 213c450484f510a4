"""Predicts the memory of a recipe on a model, and chooses the engine for ``auto``."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PretrainedConfig

from sglp_llm.compensation import NONE, get_method
from sglp_llm.criteria import make_criterion
from sglp_llm.engine import Need
from sglp_llm.errors import UserError
from sglp_llm.memory.free import free_memory
from sglp_llm.memory.peaks import Work, choose_engine, plan_memory
from sglp_llm.memory.records import EngineMemory, FreeMemory, MemoryPlan
from sglp_llm.models.loading import DTYPES, gguf_dtype
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import Recipe


def predict_memory(config: PretrainedConfig, recipe: Recipe, gguf: bool = False) -> MemoryPlan:
    """Predicts the peak memory of an analysis on this machine, with both engines.

    Args:
        config: The resolved configuration.
        recipe: The settings; the budget does not matter.
        gguf: Whether the weights are those of a GGUF file.

    Raises:
        UserError: A criterion does not exist, or transformers cannot run such a model.
    """
    work = replace(work_of(recipe), whole_on_host=gguf)
    return plan_memory(config, computed_in(config, recipe, gguf), work, torch.cuda.is_available(), free_for(recipe))


def computed_in(config: PretrainedConfig, recipe: Recipe, gguf: bool) -> torch.dtype:
    """The dtype of the computation; for ``auto`` the configuration's, float32 where it names none, `gguf_dtype` for GGUF."""
    stored = gguf_dtype() if gguf else getattr(config, "dtype", None)
    return DTYPES.get(recipe.dtype) or stored or torch.float32


def work_of(recipe: Recipe) -> Work:
    """The `Work` of the recipe's criteria and its compensation.

    Raises:
        UserError: A criterion or the compensation does not exist.
    """
    needs = Need.HIDDEN_STATES if recipe.is_segmented else Need.NOTHING
    for name in (recipe.deciding_criterion, *recipe.also):
        criterion = make_criterion(name, 1, recipe.seed, recipe.options.get(name))
        needs |= criterion.needs | criterion.needs_with_trials
    method = None if recipe.compensate == NONE else get_method(recipe.compensate)
    return Work(
        needs=needs,
        samples=recipe.samples,
        seq_len=recipe.seq_len,
        trial_samples=min(recipe.trial_samples or recipe.samples, recipe.samples),
        batch_size=min(recipe.batch_size, recipe.samples),
        minibatch=recipe.minibatch_sequences * min(recipe.minibatch_positions, recipe.seq_len),
        sums_on_host=recipe.options.get("taylor", {}).get("accumulator") == "host",
        scratch=recipe.scratch is not None,
        compensation=None if method is None else method.matrices,
        of_inputs=method is not None and method.of_inputs,
        refined_sequences=0 if method is None else method.refined_sequences,
        protected=recipe.protect.first,
        removed=recipe.drop or recipe.ratio or 0,
    )


def free_for(recipe: Recipe) -> FreeMemory:
    """The free memory in the places that the recipe uses: accelerate's placements may use every device."""
    return free_memory(recipe.device_map is not None, recipe.scratch)


def predict_for(opened: OpenedModel, recipe: Recipe) -> MemoryPlan:
    """See `predict_memory`; a GGUF file is computed in float32 by default, a live model in its own dtype."""
    if opened.source is None:
        return plan_memory(
            opened.config, opened.load().model.dtype, work_of(recipe), torch.cuda.is_available(), free_for(recipe)
        )
    return predict_memory(opened.config, recipe, opened.source.format == "gguf")


def chosen_engine(opened: OpenedModel, recipe: Recipe) -> str:
    """``resident`` or ``streamed``: what the recipe says; for ``auto``, ``resident`` where it is predicted to fit.

    ``auto`` is also ``resident`` for a live model, for one that accelerate places, and for one not stored as safetensors: the
    streamed engine loads layers from safetensors files to one device. So it is where the memory cannot be predicted.
    """
    if recipe.engine != "auto":
        return recipe.engine
    if not _can_stream(opened, recipe):
        return "resident"
    found = forecast(opened, recipe)
    return "resident" if found is None else found[0].engine


def forecast(opened: OpenedModel, recipe: Recipe) -> tuple[EngineMemory, FreeMemory] | None:
    """The memory that the chosen engine is predicted to take, and what is free; ``None`` where it cannot be predicted."""
    try:
        plan = predict_for(opened, recipe)
    except UserError:  # no reason to stop: running such a model gives the better message
        return None
    free = free_for(recipe)
    engine: str = recipe.engine
    if engine == "auto":
        engine = choose_engine(plan, free) if _can_stream(opened, recipe) else "resident"
    return (plan.streamed if engine == "streamed" else plan.resident), free


def _can_stream(opened: OpenedModel, recipe: Recipe) -> bool:
    source = opened.source
    return source is not None and source.format == "safetensors" and not source.quantised and recipe.device_map is None
