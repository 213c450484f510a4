"""Squared norms of the weight gradients of linear layers, from their inputs and the gradients of their outputs.

With X ``[tokens, in]`` the input of a linear layer and G ``[tokens, out]`` the gradient of its output, the gradient of its
weight is G^T X. Its norm needs only inner products of tokens ("ghost norm": Goodfellow, arXiv 1510.01799, for one token; Li et
al., arXiv 2110.05679, for sequences)::

    ||G^T X||_F^2 = sum over tokens s, t of (X X^T)_st (G G^T)_st

Linears with the same input share X X^T, and their squared norms add up like their G G^T. Half precision is multiplied into
float32; sums over whole matrices are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Norms = Literal["auto", "ghost", "direct", "autograd"]
"""How norms of linears' weight gradients are taken: from Grams of tokens, from the gradient formed in pieces, by autograd, or
``auto``, whichever of the first two is cheaper."""

_HALF = (torch.float16, torch.bfloat16)


def squared_norm(gradient: torch.Tensor) -> torch.Tensor:
    """The square of the Frobenius norm, a float64 scalar.

    Row by row, because a float32 sum over a whole matrix loses up to 1e-3 of it.
    """
    rows = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.promote_types(gradient.dtype, torch.float32))
    norm: torch.Tensor = torch.linalg.vector_norm(rows, dtype=torch.float64)
    return norm.square()


def linear_squared_norm(inputs: torch.Tensor, gradients: Sequence[torch.Tensor], norms: Norms = "auto") -> torch.Tensor:
    """The squared norm of the weight gradients of all linears that had the same input.

    Args:
        inputs: ``[tokens, in]``.
        gradients: Of each linear's output, ``[tokens, out]``; the widths may differ.
        norms: ``auto``, ``ghost`` or ``direct``.

    Returns:
        The sum of the weights' ``||gradient||_F^2``, a float64 scalar.
    """
    assert norms != "autograd"
    if norms == "auto":
        tokens, width_in = inputs.shape
        widths_out = [gradient.shape[1] for gradient in gradients]
        norms = "ghost" if ghost_is_cheaper(tokens, width_in, widths_out, _block(inputs.device)) else "direct"
    formula = _by_grams if norms == "ghost" else _by_pieces
    return formula(_multipliable(inputs), [_multipliable(gradient) for gradient in gradients])


def ghost_is_cheaper(tokens: int, width_in: int, widths_out: Sequence[int], block: int) -> bool:
    """Whether the Grams cost less than forming the gradients.

    Args:
        tokens: Of the sequence.
        width_in: Of the common input.
        widths_out: Of each linear's output.
        block: Tokens in a block of the Grams, which are computed on and below the diagonal only.
    """
    entries = sum((tokens - first) * min(block, tokens - first) for first in range(0, tokens, block))
    # Narrow blocks multiply less efficiently: by a factor of 1.03 to 1.21 where the two cost about the same, measured on one
    # AVX-512 core in float32 (benchmarks/gradnorm.py --table). A choice that is wrong inside this range costs a tenth.
    return 1.15 * entries * (width_in + sum(widths_out)) <= tokens * width_in * sum(widths_out)


def _by_grams(inputs: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Column by column of blocks, from the diagonal down: the Grams are symmetric, and never whole in memory."""
    block = _block(inputs.device)
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    for first in range(0, len(inputs), block):
        columns = slice(first, first + block)
        products = _sum_of_products([(inputs[first:], inputs[columns].T)])
        products *= _sum_of_products([(gradient[first:], gradient[columns].T) for gradient in gradients])
        # Within a row float32 is as exact as the entries are; float64 over all entries would be another large temporary.
        rows = products.sum(dim=-1).double()
        total += rows[:block].sum() + 2 * rows[block:].sum()
    return total.clamp_min_(0)  # rounding may leave a gradient of 0 slightly below


def _by_pieces(inputs: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Some rows of each gradient at a time, so that what is formed stays in the cache and small."""
    rows = max(1, _piece_elements(inputs.device) // max(1, inputs.shape[1]))
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    for gradient in gradients:
        for piece in gradient.T.split(rows):
            total += squared_norm(_sum_of_products([(piece, inputs)]))
    return total


def _block(device: torch.device) -> int:
    """Tokens in a block: few, for there is less to compute twice; a GPU wants fewer and larger kernels."""
    return 128 if device.type == "cpu" else 512


def _piece_elements(device: torch.device) -> int:
    return 2**20 if device.type == "cpu" else 2**24


def _multipliable(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.float() if matrix.dtype in _HALF and not matrix.is_cuda else matrix


def _sum_of_products(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """``sum of a @ b``, accumulated in float32 at least."""
    total = None
    for a, b in pairs:
        if a.dtype in _HALF:  # on CUDA, the only place where this option exists
            product = torch.mm(a, b, out_dtype=torch.float32)
            total = product if total is None else total.add_(product)
        else:
            total = a @ b if total is None else total.addmm_(a, b)
    assert total is not None
    return total
