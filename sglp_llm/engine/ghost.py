"""Squared norms of the weight gradients of linear layers, from their inputs and the gradients of their outputs.

With X ``[tokens, in]`` the input of a linear layer and G ``[tokens, out]`` the gradient of its output, the gradient of its
weight is G^T X. Its norm needs only inner products of tokens ("ghost norm": Goodfellow, arXiv 1510.01799, for one token; Li et
al., arXiv 2110.05679, for sequences)::

    ||G^T X||_F^2 = sum over tokens s, t of (X X^T)_st (G G^T)_st

For linear layers with the same input X X^T is computed once, and the sum of their squared norms is obtained from the sum of
their G G^T. Products of half precision matrices accumulate in float32; sums over whole matrices are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Norms = Literal["auto", "ghost", "direct", "autograd"]
"""How the norms of linear layers' weight gradients are computed: from Gram matrices of tokens (``ghost``), from the gradient
computed block by block (``direct``), by ``autograd``, or ``auto``, the cheaper of the first two."""

_HALF = (torch.float16, torch.bfloat16)


def squared_norm(gradient: torch.Tensor) -> torch.Tensor:
    """The square of the Frobenius norm, a float64 scalar.

    Computed row by row, because a float32 sum over a whole matrix has a relative error of up to 1e-3.
    """
    rows = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.promote_types(gradient.dtype, torch.float32))
    norm: torch.Tensor = torch.linalg.vector_norm(rows, dtype=torch.float64)
    return norm.square()


def linear_squared_norm(inputs: torch.Tensor, gradients: Sequence[torch.Tensor], norms: Norms = "auto") -> torch.Tensor:
    """The squared norm of the weight gradients of all linear layers that had the same input.

    Args:
        inputs: ``[tokens, in]``.
        gradients: The gradient of each linear layer's output, ``[tokens, out]``; the widths may differ.
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
    """Whether the Gram matrices cost less than the gradients themselves.

    Args:
        tokens: Number of tokens of the sequence.
        width_in: Width of the common input.
        widths_out: Width of each linear layer's output.
        block: Tokens per block of the Gram matrices; only blocks on and below the diagonal are computed.
    """
    entries = sum((tokens - first) * min(block, tokens - first) for first in range(0, tokens, block))
    # Narrow blocks multiply less efficiently: by a factor of 1.03 to 1.21 where the two cost about the same, measured on one
    # AVX-512 core in float32 (benchmarks/gradnorm.py --table). A wrong choice within this range costs about a tenth.
    return 1.15 * entries * (width_in + sum(widths_out)) <= tokens * width_in * sum(widths_out)


def _by_grams(inputs: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """By block columns, from the diagonal down: the Gram matrices are symmetric and never in memory as a whole."""
    block = _block(inputs.device)
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    for first in range(0, len(inputs), block):
        columns = slice(first, first + block)
        products = _sum_of_products([(inputs[first:], inputs[columns].T)])
        products *= _sum_of_products([(gradient[first:], gradient[columns].T) for gradient in gradients])
        # Within a row a float32 sum is as accurate as the entries; float64 for all entries would need a large temporary.
        rows = products.sum(dim=-1).double()
        total += rows[:block].sum() + 2 * rows[block:].sum()
    return total.clamp_min_(0)  # rounding can make a zero norm slightly negative


def _by_pieces(inputs: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Some rows of each gradient at a time, so that the temporaries are small and stay in the cache."""
    rows = max(1, _piece_elements(inputs.device) // max(1, inputs.shape[1]))
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    for gradient in gradients:
        for piece in gradient.T.split(rows):
            total += squared_norm(_sum_of_products([(piece, inputs)]))
    return total


def _block(device: torch.device) -> int:
    """Tokens per block. Small blocks compute less above the diagonal; a GPU needs fewer and larger kernels."""
    return 128 if device.type == "cpu" else 512


def _piece_elements(device: torch.device) -> int:
    return 2**20 if device.type == "cpu" else 2**24


def _multipliable(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.float() if matrix.dtype in _HALF and not matrix.is_cuda else matrix


def _sum_of_products(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """``sum of a @ b``, accumulated in at least float32."""
    total = None
    for a, b in pairs:
        if a.dtype in _HALF:  # CUDA only (see `_multipliable`), as is out_dtype
            product = torch.mm(a, b, out_dtype=torch.float32)
            total = product if total is None else total.add_(product)
        else:
            total = a @ b if total is None else total.addmm_(a, b)
    assert total is not None
    return total
