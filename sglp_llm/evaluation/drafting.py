"""The shortened model as the draft model of its original: speculative decoding, and what it gains."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from sglp_llm.errors import UserError
from sglp_llm.evaluation.benchmark import Measured, measured, ratios
from sglp_llm.evaluation.memory import devices_of, synchronize
from sglp_llm.models.modes import evaluating
from sglp_llm.models.opened import OpenedModel
from sglp_llm.progress import Progress, silent


@dataclass(frozen=True)
class DraftSettings:
    """The settings of a measurement.

    Attributes:
        new_tokens: Tokens that are generated after each prompt, end-of-text tokens ignored.
        draft_tokens: Tokens that the draft model proposes a step.
        warmup: Rounds over all prompts that are not timed.
        repeats: Timed rounds.
    """

    new_tokens: int = 32
    draft_tokens: int = 5
    warmup: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, least in (("new_tokens", 2), ("draft_tokens", 1), ("warmup", 0), ("repeats", 1)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name} must be at least {least}, not {value}")


@dataclass(frozen=True)
class Drafting:
    """The result for one pair of models.

    Attributes:
        original: Name of the original.
        draft: Name of the draft model.
        dtype: The dtype of the original's computation.
        device: Where its input is.
        prompts: Number of prompts.
        prompt_len: Tokens of each.
        equal: Number of prompts after which both ways gave the same tokens: all, but for ties that rounding breaks.
        steps: Forward passes of the original, over all prompts.
        acceptance_length: Mean number of new tokens of such a pass: the accepted ones and the original's own.
        acceptance_rate: Share of the proposed tokens that were accepted.
        plain_tokens_per_second: New tokens over the time of plain greedy generation by the original, prompts included.
        draft_tokens_per_second: The same with the draft model.
        speed_up: Ratio of the two, repeat by repeat.
    """

    original: str
    draft: str
    dtype: str
    device: str
    prompts: int
    prompt_len: int
    equal: int
    steps: int
    acceptance_length: float
    acceptance_rate: float
    plain_tokens_per_second: Measured
    draft_tokens_per_second: Measured
    speed_up: Measured


def measure_drafting(
    original: OpenedModel,
    draft: OpenedModel,
    prompts: torch.Tensor,
    settings: DraftSettings,
    progress: Progress = silent,
) -> Drafting:
    """Generates after every prompt with transformers' assisted generation and without, in turns.

    Args:
        original: The model that decides.
        draft: The model that proposes.
        prompts: Token ids ``[prompts, tokens]``; text that the models are for, since random ids are continued by nobody alike.
        settings: What is measured.
        progress: Reports rounds over all prompts.

    Raises:
        UserError: The vocabularies differ, prompt and new tokens are more than the positions of a model, or transformers cannot
            generate with the pair.
    """
    check_pair(original, draft, prompts.shape[1] + settings.new_tokens)
    large, small = original.load().model, draft.load().model
    ids = prompts.to(original.load().input_device)
    devices = devices_of(large)
    plain = GenerationConfig(do_sample=False, max_new_tokens=settings.new_tokens, use_cache=True)
    times: dict[bool, list[float]] = {False: [], True: []}
    with (
        torch.inference_mode(),
        evaluating(large),
        evaluating(small),
        _generating(large, GenerationConfig()),
        _generating(small, _drafting(settings)),
        progress("Measuring", 2 * (settings.warmup + settings.repeats + 1)) as advance,
    ):
        expected = _continued(large, ids, plain)
        advance(1)
        with _counting(large) as lengths:
            found = _continued(large, ids, plain, small, original.identity.name)
        advance(1)
        for repeat in range(settings.warmup + settings.repeats):
            for drafted in (False, True) if repeat % 2 == 0 else (True, False):
                synchronize(devices)
                start = time.perf_counter()
                _continued(large, ids, plain, small if drafted else None)
                synchronize(devices)
                times[drafted].append(time.perf_counter() - start)
                advance(1)
    new, steps = found.numel(), len(lengths)
    # A pass takes the last token and the proposed ones, the first one the prompt too.
    proposed = sum(lengths) - ids.numel() - (steps - len(ids))
    rates = {
        drafted: measured([new / seconds for seconds in each[settings.warmup :]]) for drafted, each in times.items()
    }
    return Drafting(
        original=original.identity.name,
        draft=draft.identity.name,
        dtype=str(large.dtype).removeprefix("torch."),
        device=str(ids.device),
        prompts=len(ids),
        prompt_len=ids.shape[1],
        equal=int((expected == found).all(dim=1).sum()),
        steps=steps,
        acceptance_length=new / steps,
        acceptance_rate=(new - steps) / max(proposed, 1),
        plain_tokens_per_second=rates[False],
        draft_tokens_per_second=rates[True],
        speed_up=ratios(rates[True], rates[False]),
    )


def check_pair(original: OpenedModel, draft: OpenedModel, tokens: int) -> None:
    """Checks, before weights are loaded, that one model can draft for the other.

    Args:
        original: The model that decides.
        draft: The model that proposes.
        tokens: Length of a prompt and its continuation.

    Raises:
        UserError: The vocabularies differ in size, or a model has fewer positions.
    """
    sizes = [int(model.text_config.vocab_size) for model in (original, draft)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{draft.identity.name} cannot draft for {original.identity.name}: it has a vocabulary of {sizes[1]} tokens, "
            f"and the original one of {sizes[0]}"
        )
    for model in (original, draft):
        limit = getattr(model.text_config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise UserError(
                f"{model.identity.name}: prompt and new tokens are {tokens}, more than the model's {limit} positions; "
                "lower prompt_len or new_tokens"
            )


def _continued(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    settings: GenerationConfig,
    draft: PreTrainedModel | None = None,
    name: str = "the model",
) -> torch.Tensor:
    """The new tokens ``[prompts, new tokens]``; one prompt at a time, as assisted generation wants it."""
    found = []
    for prompt in prompts:
        options: dict[str, Any] = {} if draft is None else {"assistant_model": draft}
        mask = torch.ones_like(prompt[None])
        try:
            sequence = model.generate(prompt[None], attention_mask=mask, generation_config=settings, **options)
        except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            if draft is None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"{name}: transformers cannot generate with a draft model ({' '.join(str(error).split())[:300]})"
            ) from None
        found.append(sequence[0, len(prompt) :])
    return torch.stack(found)


def _drafting(settings: DraftSettings) -> GenerationConfig:
    """Always the same number of proposed tokens, so that the acceptance length does not depend on a schedule."""
    return GenerationConfig(
        num_assistant_tokens=settings.draft_tokens,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )


@contextmanager
def _generating(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Inside the block the model has these generation settings instead of its own, which may stop at tokens or punish them."""
    before, model.generation_config = model.generation_config, settings
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn that no token is named for padding
    try:
        yield
    finally:
        model.generation_config = before
        logging.set_verbosity(verbosity)


@contextmanager
def _counting(model: PreTrainedModel) -> Iterator[Sequence[int]]:
    """The numbers of tokens that the model's forward passes take inside the block."""
    lengths: list[int] = []

    def count(_: object, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        ids = options.get("input_ids", args[0] if args else None)
        assert ids is not None
        lengths.append(ids.shape[1])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield lengths
    finally:
        hook.remove()
