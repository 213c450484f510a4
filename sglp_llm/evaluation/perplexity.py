"""Perplexity over windows that do not overlap."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from sglp_llm.calibration import EvaluationWindows
from sglp_llm.engine.final import final_states
from sglp_llm.engine.head import losses
from sglp_llm.engine.loss import token_nll
from sglp_llm.errors import UserError
from sglp_llm.evaluation.records import EvalResult
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating
from sglp_llm.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def perplexity(
    model: PreTrainedModel | DecoderModel,
    windows: EvaluationWindows,
    *,
    batch_size: int = 1,
    progress: Progress = silent,
) -> EvalResult:
    """exp of the mean token negative log-likelihood over all predicted tokens.

    The standard error is that of the mean over windows, which are far less dependent on each other than tokens are. It is
    0.0 for a single window, because JSON has no NaN.

    Args:
        model: Any causal language model of transformers, on any device, or one with streamed layers; its training mode is
            restored.
        windows: The windows to measure on.
        batch_size: Windows in one forward pass; changes memory and speed only.
        progress: Reports finished windows; for a streamed model, finished layers.

    Raises:
        UserError: A window is longer than the model's context, the loss of one is not finite, or ``batch_size`` is
            below 1.
    """
    return summary(window_losses(model, windows, batch_size=batch_size, progress=progress), windows)


def window_losses(
    model: PreTrainedModel | DecoderModel,
    windows: EvaluationWindows,
    *,
    batch_size: int = 1,
    progress: Progress = silent,
) -> torch.Tensor:
    """Mean token negative log-likelihood of every window, ``[windows]`` float64 on the CPU; see `perplexity`.

    Raises:
        UserError: A window is longer than the model's context, or ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; at least 1 window is needed")
    count, length = windows.input_ids.shape
    decoder = model if isinstance(model, DecoderModel) else None
    model = model.model if isinstance(model, DecoderModel) else model
    _check_context(model, length)
    if decoder is not None and decoder.weights is not None:
        found = final_states(decoder, windows.input_ids, batch_size, progress)
        return torch.cat([losses(replay, states).cpu() for _, replay, states in found])
    means: list[torch.Tensor] = []
    with torch.inference_mode(), evaluating(model), progress("Scoring", count) as advance:
        for batch in windows.input_ids.split(batch_size):
            input_ids = batch.to(_input_device(model))
            logits = model(input_ids=input_ids, use_cache=False).logits
            means.append(token_nll(logits, input_ids).cpu().double().mean(dim=1))
            advance(len(batch))
    return torch.cat(means)


def summary(window_means: torch.Tensor, windows: EvaluationWindows) -> EvalResult:
    """The perplexity from the windows' mean losses, ``[windows]`` float64; windows have equal length, so each counts the same.

    Raises:
        UserError: A loss is not finite.
    """
    count, length = windows.input_ids.shape
    for number, value in enumerate(window_means.tolist()):
        if not math.isfinite(value):
            raise UserError(
                f"{windows.source}: the loss of window {number} (of {count}, counted from 0) is {value};"
                " the weights are damaged, or they overflow in this dtype: try bfloat16 or float32"
            )
    mean = float(window_means.mean())
    error = float(window_means.std(correction=1)) / math.sqrt(count) if count > 1 else 0.0
    try:
        value = math.exp(mean)
    except OverflowError:
        raise UserError(
            f"{windows.source}: the mean loss is {mean:.4g} nats a token, beyond any perplexity;"
            " the weights are damaged"
        ) from None
    return EvalResult(
        dataset=windows.source,
        window=length,
        windows=count,
        bos=windows.bos,
        tokens=count * (length - 1),
        mean_nll=mean,
        nll_standard_error=error,
        perplexity=value,
        perplexity_standard_error=value * error,
    )


def _check_context(model: PreTrainedModel, length: int) -> None:
    """Refuses windows beyond the context: learned positions would fail inside the model, rotary ones look like a bad model."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(f"a window of {length} tokens is longer than the model's context of {limit}; lower window")


def _input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids must be; accelerate's hooks move offloaded embeddings (on "meta") to the ids' device."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device
