"""The negative log-likelihood of the next token: differentiable, computed in float32 for any model dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sglp_llm.errors import UserError


def token_nll(logits: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The loss of every prediction: entry ``t`` is that of token ``t + 1``, given the tokens up to ``t``.

    A prediction counts if the predicted token and the one before it are both real, not padding. With left padding the first
    real token has no context to be predicted from.

    Args:
        logits: ``[batch, tokens, vocabulary]``.
        input_ids: ``[batch, tokens]``; moved to the device of the logits.
        mask: ``[batch, tokens]``, true (or 1) for real tokens; None means all of them.

    Returns:
        ``[batch, tokens - 1]``, float32, 0 for predictions that do not count, on the device of the logits.
    """
    targets = input_ids[:, 1:].to(logits.device)
    flat = cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none")
    losses = flat.view(targets.shape)
    counts = _counts(mask, logits.device)
    return losses if counts is None else losses.masked_fill(~counts, 0.0)


def sequence_loss(logits: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean loss of each sequence over its own predictions, independent of the other sequences in the batch.

    Args:
        logits: ``[batch, tokens, vocabulary]``.
        input_ids: ``[batch, tokens]``.
        mask: ``[batch, tokens]``, true (or 1) for real tokens; None means all of them.

    Returns:
        ``[batch]``, float32; 0 for a sequence that has nothing to predict.
    """
    losses = token_nll(logits, input_ids, mask)
    return losses.sum(dim=1) / num_predictions(mask, losses.shape[1], logits.device)


def num_predictions(mask: Tensor | None, most: int, device: torch.device) -> Tensor | int:
    """How many predictions of each sequence count, at least 1: ``[batch]``, or one number for all without a mask.

    Args:
        mask: ``[batch, tokens]``; None means no padding.
        most: Number of predictions of a sequence without padding.
        device: Device of the result.
    """
    counts = _counts(mask, device)
    return max(most, 1) if counts is None else counts.sum(dim=1).clamp(min=1)


def not_finite(loss: float, sequence: int, layer: int | None) -> UserError:
    """The error for a loss that is not finite.

    Args:
        loss: Its value.
        sequence: Index of the calibration sequence.
        layer: The first decoder layer whose output is not finite; ``None`` if all are.
    """
    place = (
        "every decoder layer's output is"
        if layer is None
        else f"decoder layer {layer} is the first whose output is not"
    )
    return UserError(
        f"the loss is not finite ({loss}) on calibration sequence {sequence}: {place}; "
        "the weights are damaged, or the dtype is too small (try --dtype float32)"
    )


def _counts(mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Which predictions count, ``[batch, tokens - 1]``; None if all do."""
    if mask is None:
        return None
    real = mask.to(device=device, dtype=torch.bool)
    return real[:, 1:] & real[:, :-1]
