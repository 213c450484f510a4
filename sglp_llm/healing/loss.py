"""What a student is trained on: the divergence from its teacher and the next-token loss, each a mean over sequences.

A sequence's own mean comes first, so that no sequence counts more for being in a smaller batch, and the mean over processes is
the mean over all sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORED = -100
"""The label of a token that is not to be predicted, as everywhere in transformers."""

_CHUNK_BYTES = 32 * 2**20  # of float32 logits at a time; a few tensors of that size exist at once


@dataclass(frozen=True)
class TopK:
    """A teacher's most likely next tokens at every position.

    Attributes:
        ids: ``[batch, tokens, k]`` int64.
        log_probs: ``[batch, tokens, k]`` float32, of the softened distribution over the whole vocabulary.
    """

    ids: Tensor
    log_probs: Tensor


def top_k_of(logits: Tensor, k: int, temperature: float) -> TopK:
    """The ``k`` most likely tokens of the distribution that these logits make at a temperature.

    Args:
        logits: ``[batch, tokens, vocabulary]``.
        k: How many; all of them where the vocabulary is smaller.
        temperature: Divides the logits.
    """
    log_probs = (logits.float() / temperature).log_softmax(dim=-1)
    values, ids = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
    return TopK(ids, values)


def position_weights(labels: Tensor) -> Tensor:
    """What each position counts in the mean over sequences of the mean over predictions, ``[batch, tokens - 1]`` float32.

    Position ``t`` predicts token ``t + 1``; it counts where that token's label is not `IGNORED`. A sequence that predicts nothing
    counts 0.

    Args:
        labels: ``[batch, tokens]``.
    """
    counted = labels[:, 1:] != IGNORED
    return counted / counted.sum(dim=1, keepdim=True).clamp(min=1) / len(labels)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over sequences of the mean negative log-likelihood of the labelled tokens, a scalar in nats.

    Args:
        logits: ``[batch, tokens, vocabulary]``.
        labels: ``[batch, tokens]``, `IGNORED` where nothing is to be predicted.
    """
    targets = labels[:, 1:]
    flat = cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    return (flat.view(targets.shape) * position_weights(labels).to(logits.device)).sum()


def divergence(logits: Tensor, teacher: Tensor | TopK, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(teacher || student)`` of the next-token distributions at temperature T (Hinton et al., arXiv 1503.02531).

    Of a `TopK` the tokens that are not in it are one bucket. A scalar: the mean over sequences of means over counted positions.

    Args:
        logits: The student's, ``[batch, tokens, vocabulary]``.
        teacher: The teacher's logits of the same shape, or its most likely tokens, softened at the same temperature.
        labels: ``[batch, tokens]``: which positions count.
        temperature: T.
    """
    weights = position_weights(labels).to(logits.device)
    if isinstance(teacher, TopK):
        bucketed = _bucketed_divergence(logits[:, :-1], teacher, temperature)
        return temperature**2 * (bucketed * weights).sum()
    whole: Tensor = _Divergence.apply(logits[:, :-1], teacher[:, :-1], weights, temperature)
    return temperature**2 * whole


class _Divergence(torch.autograd.Function):
    """The weighted sum of ``KL(teacher || student)``, whose gradient is formed in the same pass over chunks of positions.

    Autograd alone would keep four more tensors as large as the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, weights: Tensor, temperature: float) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        length = max(1, _CHUNK_BYTES // (4 * logits.shape[0] * logits.shape[-1]))
        for first in range(0, logits.shape[1], length):
            part = slice(first, first + length)
            own = (logits[:, part].float() / temperature).log_softmax(dim=-1)
            other = (teacher[:, part].to(logits.device).float() / temperature).log_softmax(dim=-1)
            likely = other.exp()
            total += ((likely * (other - own)).sum(dim=-1) * weights[:, part]).sum()
            if gradient is not None:
                gradient[:, part] = (own.exp_() - likely) * (weights[:, part, None] / temperature)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None, None


def _bucketed_divergence(logits: Tensor, teacher: TopK, temperature: float) -> Tensor:
    """``[batch, tokens - 1]``, float32; of the teacher the last position is not used."""
    log_teacher = teacher.log_probs[:, :-1].to(logits.device)
    own = (logits.float() / temperature).log_softmax(dim=-1)
    chosen = own.gather(-1, teacher.ids[:, :-1].to(logits.device))
    kept = (log_teacher.exp() * (log_teacher - chosen)).sum(dim=-1)
    if teacher.ids.shape[-1] == logits.shape[-1]:
        return kept
    rest, own_rest = (_rest(each) for each in (log_teacher, chosen))
    return kept + rest * (rest.log() - own_rest.log())


def _rest(log_probs: Tensor) -> Tensor:
    """The probability of all other tokens, above 0 so that its logarithm is finite."""
    return (1 - log_probs.exp().sum(dim=-1)).clamp(min=1e-7)
