"""From the hidden states that leave the last decoder layer to the loss, over chunks of tokens.

The logits of a whole sequence have tokens x vocabulary elements, so only those of one chunk are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglp_llm.engine.loss import num_predictions, token_nll
from sglp_llm.engine.replay import Replay
from sglp_llm.method.exact import exact
from sglp_llm.models.devices import free_on

CHUNK_BYTES = 64 * 2**20
"""Bytes of float32 logits at once; the loss and its gradient hold about three times as much."""

DEVICE_CHUNK_BYTES = 512 * 2**20
"""The same on a GPU with room for it: every chunk reads the whole head, 1 GB with a vocabulary of 128k, and launches all over."""

_FREE_SHARE = 1 / 16  # of a device's free memory that a chunk may have
# On the CPU the allocator returns blocks of 32 MiB and more to the system when they are freed, and page faults on new memory cost
# more than smaller matrix products; with too few tokens the products become slow.
_CPU_CHUNK_BYTES = 24 * 2**20
_CPU_CHUNK_TOKENS = 128


def losses(replay: Replay, states: torch.Tensor) -> torch.Tensor:
    """The mean loss of each sequence, ``[batch]`` float64; see `sglp_llm.engine.loss.sequence_loss`.

    Args:
        replay: The batch.
        states: ``[batch, tokens, hidden]``, before the final norm.
    """
    parts = [
        exact(_chunk_nll(replay, states[:, first:end], first, end)).sum(dim=1) for first, end in _chunks(replay, states)
    ]
    return torch.stack(parts).sum(dim=0) / num_predictions(replay.mask, states.shape[1] - 1, parts[0].device)


def loss_and_gradient(replay: Replay, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of each sequence and the gradient of their sum with respect to ``states``.

    Args:
        replay: The batch.
        states: ``[batch, tokens, hidden]``, before the final norm.

    Returns:
        ``[batch]`` float64, and ``[batch, tokens, hidden]`` in the dtype of the states.
    """
    gradient = torch.zeros_like(states)
    parts = []
    for first, end in _chunks(replay, states):
        part = states[:, first:end].detach().requires_grad_(True)
        with torch.enable_grad():
            summed = _chunk_nll(replay, part, first, end).sum(dim=1)
            losses = summed / num_predictions(replay.mask, states.shape[1] - 1, summed.device)
            (part_gradient,) = torch.autograd.grad(losses.sum(), part)
        parts.append(exact(losses.detach()))
        gradient[:, first:end] += part_gradient
    return torch.stack(parts).sum(dim=0), gradient


def divergence(replay: Replay, states: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """KL(next-token distribution of ``dense`` || that of ``states``), mean over each sequence's positions, ``[batch]`` float64.

    Args:
        replay: The batch.
        states: ``[batch, tokens, hidden]``, before the final norm.
        dense: The same for the reference model.
    """
    parts = []
    for first, end in _pieces(replay, states):
        own = replay.logits(states[:, first:end], slice(first, end)).float().log_softmax(dim=-1)
        other = replay.logits(dense[:, first:end], slice(first, end)).float().log_softmax(dim=-1)
        likely = other.exp()
        each = other.sub_(own).mul_(likely).sum(dim=-1)  # in-place: these are the largest tensors in memory
        parts.append(exact(each * _weights(replay, each.device)[:, first:end]).sum(dim=1))
    return torch.stack(parts).sum(dim=0)


def divergence_gradient(replay: Replay, states: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """The gradient of the sum of `divergence` with respect to ``states``, in their shape and dtype."""
    gradient = torch.zeros_like(states)
    for first, end in _pieces(replay, states):
        with torch.no_grad():
            other = replay.logits(dense[:, first:end], slice(first, end)).float().softmax(dim=-1)
        part = states[:, first:end].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = replay.logits(part, slice(first, end))
        # The gradient of KL with respect to the logits is a difference of two distributions. Autograd would keep three more
        # tensors of that size.
        own = logits.detach().float().softmax(dim=-1)
        by_logits = own.sub_(other).mul_(_weights(replay, own.device)[:, first:end, None])
        (gradient[:, first:end],) = torch.autograd.grad(logits, part, by_logits.to(logits.dtype))
    return gradient


def _weights(replay: Replay, device: torch.device) -> torch.Tensor:
    """The weight of each position in its sequence's mean, ``[batch, tokens]``."""
    if replay.mask is None:
        return torch.full(replay.ids.shape, 1 / replay.ids.shape[1], device=device)
    mask = replay.mask.to(device)
    return mask / mask.sum(dim=1, keepdim=True)


def _pieces(replay: Replay, states: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Half-open ranges of positions."""
    tokens, length = states.shape[1], max(1, _length(replay, states))
    for first in range(0, tokens, length):
        yield first, min(first + length, tokens)


def _chunks(replay: Replay, states: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Half-open ranges of positions that overlap by one: the target of a chunk's last position is in the next chunk."""
    tokens, length = states.shape[1], max(2, _length(replay, states))
    for first in range(0, tokens - 1, length - 1):
        yield first, min(first + length, tokens)


def _length(replay: Replay, states: torch.Tensor) -> int:
    """Number of positions per chunk; 0 if even one position exceeds the size limit."""
    size = CHUNK_BYTES
    if (free := free_on(states.device)) is not None:
        size = max(size, min(DEVICE_CHUNK_BYTES, int(_FREE_SHARE * free)))
    if states.device.type == "cpu":
        size = min(size, max(_CPU_CHUNK_BYTES, 4 * _CPU_CHUNK_TOKENS * replay.vocabulary))
    return size // (4 * len(states) * replay.vocabulary)


def _chunk_nll(replay: Replay, states: torch.Tensor, first: int, end: int) -> torch.Tensor:
    mask = None if replay.mask is None else replay.mask[:, first:end]
    return token_nll(replay.logits(states, slice(first, end)), replay.ids[:, first:end], mask)
