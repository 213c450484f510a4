"""From a model and a recipe to a prediction of memory, and to the engine that `auto` means."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from sglp_llm.analysis import deciding_criterion, is_segmented
from sglp_llm.criteria import get_criterion
from sglp_llm.engine.observer import Need
from sglp_llm.free_memory import free_memory
from sglp_llm.loading import DTYPES
from sglp_llm.memory import Work, choose_engine, plan_memory
from sglp_llm.recipe import Recipe
from sglp_llm.records import FreeMemory, MemoryPlan
from sglp_llm.subject import Subject


def predict_memory(config: PretrainedConfig, recipe: Recipe, stored: torch.dtype | None = None) -> MemoryPlan:
    """Predicts the peak memory of an analysis on this machine, with both engines.

    Args:
        config: The resolved configuration.
        recipe: The settings; the budget does not matter.
        stored: What the weights are stored in, for a recipe that keeps it; none = what the configuration says, or float32.

    Raises:
        UserError: A criterion does not exist.
    """
    dtype = DTYPES.get(recipe.dtype) or stored or getattr(config, "dtype", None) or torch.float32
    return plan_memory(config, dtype, work_of(recipe), torch.cuda.is_available())


def work_of(recipe: Recipe) -> Work:
    """What the recipe's criteria do, as far as memory is concerned.

    Raises:
        UserError: A criterion does not exist.
    """
    needs = Need.HIDDEN_STATES if is_segmented(recipe) else Need.NOTHING
    for name in (deciding_criterion(recipe), *recipe.also):
        needs |= get_criterion(name).needs
    return Work(
        needs=needs,
        samples=recipe.samples,
        seq_len=recipe.seq_len,
        trial_samples=min(recipe.trial_samples or recipe.samples, recipe.samples),
        batch_size=min(recipe.batch_size, recipe.samples),
        minibatch=recipe.minibatch_sequences * min(recipe.minibatch_positions, recipe.seq_len),
        sums_on_host=recipe.options.get("taylor", {}).get("accumulator") == "host",
        scratch=recipe.scratch is not None,
    )


def free_for(recipe: Recipe) -> FreeMemory:
    """What is free now where the recipe would have it: accelerate's placements may use every device."""
    return free_memory(recipe.device_map is not None, recipe.scratch)


def predict_for(subject: Subject, recipe: Recipe) -> MemoryPlan:
    """See `predict_memory`; a GGUF file is computed in float32 and a live model in what it is."""
    if subject.source is None:
        return predict_memory(subject.config, Recipe.with_changes(recipe, dtype="auto"), subject.load().model.dtype)
    return predict_memory(subject.config, recipe, torch.float32 if subject.source.format == "gguf" else None)


def chosen_engine(subject: Subject, recipe: Recipe) -> str:
    """``resident`` or ``streamed``: what the recipe says; ``auto`` is `choose_engine`'s word.

    A live model, one that accelerate places, and one that is not in safetensors files is resident unless told otherwise: the
    streamed engine reads layers from safetensors files to one device.
    """
    if recipe.engine != "auto":
        return recipe.engine
    streams = subject.source is not None and subject.source.format == "safetensors" and recipe.device_map is None
    return choose_engine(predict_for(subject, recipe), free_for(recipe)) if streams else "resident"
