"""Sequences that the student continues itself: it learns what the teacher predicts where its own text leads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from sglp_llm.calibration.sampling import own_settings, seed_of
from sglp_llm.healing.loss import IGNORED
from sglp_llm.models.modes import evaluating
from sglp_llm.plan.healing_recipe import HealingRecipe


def is_on_policy(recipe: HealingRecipe, step: int) -> bool:
    """Whether the student continues the sequences of a step, counted from 0: evenly spread, in the recipe's share of steps."""
    return int((step + 1) * recipe.on_policy) > int(step * recipe.on_policy)


def new_tokens(recipe: HealingRecipe, step: int, steps: int) -> int:
    """The tokens that the student adds in a step, counted from 0: ``shortest`` in the first one, all of them in the last."""
    longest = recipe.seq_len - recipe.prompt_tokens
    return round(recipe.shortest + (longest - recipe.shortest) * step / max(1, steps - 1))


def continued(
    model: Any, inputs: Mapping[str, Tensor], recipe: HealingRecipe, step: int, length: int
) -> dict[str, Tensor]:
    """The beginnings of some sequences, continued by a model at temperature 1.

    Every sequence has its own random numbers, by seed, step and number, so that the text does not depend on which sequences are
    in one batch. What follows an EOS token is not predicted.

    Args:
        model: The student.
        inputs: ``input_ids`` of the sequences, ``[batch, tokens]``, and their numbers ``sequence``, ``[batch]``.
        recipe: For ``prompt_tokens`` and the seed.
        step: The optimizer step.
        length: Tokens that are added.

    Returns:
        ``input_ids`` and ``labels``, both ``[batch, prompt_tokens + length]``; labels of the prompt are `IGNORED`.
    """
    prompt = inputs["input_ids"][:, : recipe.prompt_tokens]
    width = prompt.shape[1]
    seeds = [seed_of(recipe.seed, step, int(number)) for number in inputs["sequence"]]
    settings = _settings(model, length)
    with torch.no_grad(), evaluating(model), own_settings(model, settings):
        found = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Drawn(seeds, prompt.device)]),
        )
    ends = torch.tensor(settings.eos_token_id or [], dtype=found.dtype, device=found.device)
    is_end = torch.isin(found[:, width:], ends).long()
    ended_before = is_end.cumsum(dim=1) - is_end > 0
    labels = found.clone()
    labels[:, :width] = IGNORED
    labels[:, width:][ended_before] = IGNORED
    return {"input_ids": found, "labels": labels}


def _settings(model: Any, length: int) -> GenerationConfig:
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = [] if named is None else named if isinstance(named, list) else [named]
    # Greedy, with noise in the logits: see `_Drawn`.
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
    )


class _Drawn(LogitsProcessor):
    """Makes the most likely token a sample, by Gumbel noise (Gumbel 1954), with one generator of random numbers a sequence."""

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        rows = [
            torch.empty(scores.shape[-1], device=scores.device).exponential_(generator=generator)
            for generator in self._generators
        ]
        return scores.float() - torch.stack(rows).log()
