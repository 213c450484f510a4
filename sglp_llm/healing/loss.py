"""What a student is trained on: the divergence from its teacher and the next-token loss, each a mean over sequences.

A sequence's own mean comes first, so that no sequence counts more for being in a smaller batch, and the mean over processes is
the mean over all sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORED = -100
"""The label of a token that is not to be predicted, as everywhere in transformers."""

_CHUNK_BYTES = 64 * 2**20  # of float32 logits at a time; a few tensors of that size exist at once
_CPU_CHUNK_BYTES = 4 * 2**20  # small ones stay in the processor's cache: half the time


@dataclass(frozen=True)
class TopK:
    """A teacher's most likely next tokens at every position.

    Attributes:
        ids: ``[batch, tokens, k]`` int64.
        log_probs: ``[batch, tokens, k]`` float32, of the softened distribution over the whole vocabulary.
    """

    ids: Tensor
    log_probs: Tensor

    def at(self, positions: Tensor | slice) -> TopK:
        """Those at some positions."""
        return TopK(self.ids[:, positions], self.log_probs[:, positions])


def top_k_of(logits: Tensor, k: int, temperature: float) -> TopK:
    """The ``k`` most likely tokens of the distribution that these logits make at a temperature.

    Args:
        logits: ``[batch, tokens, vocabulary]``.
        k: How many; all of them where the vocabulary is smaller.
        temperature: Divides the logits.
    """
    log_probs = _log_probs(logits, temperature)
    values, ids = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
    return TopK(ids, values)


def sampled_positions(tokens: int, share: float, seed: int) -> Tensor | None:
    """Positions at which predictions are compared, drawn at random without replacement; ``None`` = all.

    The last position is never among them: what follows it is not known.

    Args:
        tokens: Length of the sequences.
        share: Of the ``tokens - 1`` others; at least one is drawn.
        seed: Of the draw.

    Returns:
        ``[chosen]`` int64, ascending.
    """
    predicting = tokens - 1
    count = max(1, round(share * predicting))
    if count == predicting:
        return None
    return torch.randperm(predicting, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def position_weights(labels: Tensor, positions: Tensor | None = None) -> Tensor:
    """What each position counts in the mean over sequences of the mean over predictions, ``[batch, tokens - 1]`` float32.

    Position ``t`` predicts token ``t + 1``; it counts where that token's label is not `IGNORED`. A sequence that predicts nothing
    counts 0.

    Args:
        labels: ``[batch, tokens]``.
        positions: ``[chosen]``: only these, each counting for as many more as were drawn at random for one, so that the expected
            sum stays the mean; ``None`` = all.
    """
    counted = labels[:, 1:] != IGNORED
    weights = counted / counted.sum(dim=1, keepdim=True).clamp(min=1) / len(labels)
    return weights if positions is None else weights[:, positions] * (weights.shape[1] / len(positions))


def next_token_loss(logits: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
    """The mean over sequences of the mean negative log-likelihood of the labelled tokens, a scalar in nats.

    Args:
        logits: ``[batch, tokens, vocabulary]``.
        labels: ``[batch, tokens]``, `IGNORED` where nothing is to be predicted.
        positions: ``[chosen]``: where the logits are given at these alone, and the mean is estimated; see `position_weights`.
    """
    if positions is None:
        targets, logits = labels[:, 1:], logits[:, :-1]
    else:
        targets = labels[:, positions + 1]
    flat = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return (flat.view(targets.shape) * position_weights(labels, positions).to(logits.device)).sum()


def hidden_state_loss(states: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The squared difference of two models' hidden states, relative to the teacher's square, a scalar.

    Relative at each position: a few tokens have states that are hundreds of times longer than others. The mean over sequences
    of means over counted positions.

    Args:
        states: The student's, ``[batch, tokens, hidden_size]``.
        teacher: The teacher's, of the same shape.
        labels: ``[batch, tokens]``: which positions count.
    """
    target = teacher[:, :-1].to(states.device).float()
    apart = (states[:, :-1].float() - target).square().sum(dim=-1) / target.square().sum(dim=-1).clamp(min=1e-12)
    return (apart * position_weights(labels).to(states.device)).sum()


def divergence(
    logits: Tensor,
    teacher: Tensor | TopK,
    labels: Tensor,
    temperature: float = 1.0,
    beta: float = 0.0,
    positions: Tensor | None = None,
) -> Tensor:
    """``T^2 KL(teacher || student)`` of the next-token distributions at temperature T (Hinton et al., arXiv 1503.02531).

    With ``beta`` above 0 another divergence takes the place of KL: with ``M = beta teacher + (1 - beta) student`` it is
    ``beta KL(teacher || M) + (1 - beta) KL(student || M)`` (Agarwal et al., arXiv 2306.13649, section 2), and with 1 it is
    ``KL(student || teacher)``. Of a `TopK` the tokens that are not in it are one bucket. A scalar: the mean over sequences of
    means over counted positions.

    Args:
        logits: The student's, ``[batch, tokens, vocabulary]``.
        teacher: The teacher's logits of the same shape, or its most likely tokens, softened at the same temperature.
        labels: ``[batch, tokens]``: which positions count.
        temperature: T.
        beta: Between 0 and 1.
        positions: ``[chosen]``: where both models' predictions are given at these alone, and the mean is estimated; see
            `position_weights`.
    """
    weights = position_weights(labels, positions).to(logits.device)
    predicting = slice(None) if positions is not None else slice(-1)
    logits = logits[:, predicting]
    if isinstance(teacher, TopK):
        bucketed = _bucketed_divergence(logits, teacher.at(predicting), temperature, beta)
        return temperature**2 * (bucketed * weights).sum()
    whole: Tensor = _Divergence.apply(logits, teacher[:, predicting], weights, temperature, beta)
    return temperature**2 * whole


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Float32; dividing by 1 would be one more pass over them."""
    return (logits if temperature == 1 else logits.float() / temperature).log_softmax(dim=-1, dtype=torch.float32)


def _between(own: Tensor, other: Tensor, beta: float) -> Tensor:
    """The divergence of the distributions along the last dimension, from their logarithms."""
    if beta == 0:
        return (other.exp() * (other - own)).sum(dim=-1)
    if beta == 1:
        return (own.exp() * (own - other)).sum(dim=-1)
    mixed = _mixed(own, other, beta)
    return beta * (other.exp() * (other - mixed)).sum(dim=-1) + (1 - beta) * (own.exp() * (own - mixed)).sum(dim=-1)


def _slope(own: Tensor, other: Tensor, beta: float) -> Tensor:
    """The gradient of `_between` by the logits that ``own`` was made from."""
    likely = own.exp()
    if beta == 0:
        return likely - other.exp()
    apart = own - other if beta == 1 else (1 - beta) * (own - _mixed(own, other, beta))
    return likely * (apart - (likely * apart).sum(dim=-1, keepdim=True))


def _mixed(own: Tensor, other: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(own + math.log(1 - beta), other + math.log(beta))


class _Divergence(torch.autograd.Function):
    """The weighted sum of divergences, whose gradient is formed in the same pass over chunks of positions.

    Autograd alone would keep four more tensors as large as the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, weights: Tensor, temperature: float, beta: float) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        size = _CPU_CHUNK_BYTES if logits.device.type == "cpu" else _CHUNK_BYTES
        length = max(1, size // (4 * logits.shape[0] * logits.shape[-1]))
        for first in range(0, logits.shape[1], length):
            part = slice(first, first + length)
            own = _log_probs(logits[:, part], temperature)
            other = _log_probs(teacher[:, part].to(logits.device), temperature)
            total += (_between(own, other, beta) * weights[:, part]).sum()
            if gradient is not None:
                gradient[:, part] = _slope(own, other, beta) * (weights[:, part, None] / temperature)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place: it is as large as the logits, and nothing else needs it. A second backward pass is refused by autograd.
        return gradient.mul_(outer[0]), None, None, None, None


def _bucketed_divergence(logits: Tensor, teacher: TopK, temperature: float, beta: float) -> Tensor:
    """``[batch, positions]``, float32."""
    log_teacher = teacher.log_probs.to(logits.device)
    own = _log_probs(logits, temperature)
    chosen = own.gather(-1, teacher.ids.to(logits.device))
    if teacher.ids.shape[-1] < logits.shape[-1]:
        chosen, log_teacher = (torch.cat([each, _rest(each)], dim=-1) for each in (chosen, log_teacher))
    return _between(chosen, log_teacher, beta)


def _rest(log_probs: Tensor) -> Tensor:
    """The logarithm of the probability of all other tokens, finite."""
    return (1 - log_probs.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-7).log()
