"""Squared norms of the weight gradients of linear layers, from their inputs and the gradients of their outputs.

With X ``[tokens, in]`` the input of a linear layer and G ``[tokens, out]`` the gradient of its output, the gradient of its
weight is G^T X. Its norm needs only inner products of tokens ("ghost norm": Goodfellow, arXiv 1510.01799, for one token; Li et
al., arXiv 2110.05679, for sequences)::

    ||G^T X||_F^2 = sum over tokens s, t of (X X^T)_st (G G^T)_st

For linear layers with the same input X X^T is computed once, and the sum of their squared norms is obtained from the sum of
their G G^T. Products of half precision matrices accumulate in float32; sums over whole matrices are float64.

Inner products and squares overflow float32 from 2e19 on, where the gradient itself and its norm are still finite: one token with
such an input is enough, and times the 0 of a token without gradient its infinity is NaN. There the gradient itself is computed,
and its squares in float64; only on the CPU, because the host would wait for another device to see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from sglp_llm.method.exact import exact, place_of_sums

Norms = Literal["auto", "ghost", "direct", "autograd"]
"""How the norms of linear layers' weight gradients are computed: from Gram matrices of tokens (``ghost``), from the gradient
computed block by block (``direct``), by ``autograd``, or ``auto``, the cheaper of the first two."""

_HALF = (torch.float16, torch.bfloat16)


def squared_norm(gradient: torch.Tensor) -> torch.Tensor:
    """The square of the Frobenius norm, a float64 scalar.

    Computed row by row, because a float32 sum over a whole matrix has a relative error of up to 1e-3.
    """
    norm: torch.Tensor = torch.linalg.vector_norm(_norms_of_rows(gradient))
    return norm.square()


def linear_squared_norm(inputs: torch.Tensor, gradients: Sequence[torch.Tensor], norms: Norms = "auto") -> torch.Tensor:
    """The squared norm of the weight gradients of all linear layers that had the same input, for each sequence of a batch.

    Args:
        inputs: ``[batch, tokens, in]``.
        gradients: The gradient of each linear layer's output, ``[batch, tokens, out]``; the widths may differ.
        norms: ``auto``, ``ghost`` or ``direct``.

    Returns:
        The sum of the weights' ``||gradient||_F^2``, ``[batch]`` float64.
    """
    assert norms != "autograd"
    if norms == "auto":
        _, tokens, width_in = inputs.shape
        widths_out = [gradient.shape[-1] for gradient in gradients]
        norms = "ghost" if ghost_is_cheaper(tokens, width_in, widths_out, _block(inputs.device)) else "direct"
    formula = _by_grams_if_finite if norms == "ghost" else _by_pieces
    inputs, gradients = _multipliable(inputs), [_multipliable(gradient) for gradient in gradients]
    if inputs.device.type == "cpu":  # one by one, so that the products of a sequence stay in the cache
        sequences = range(len(inputs))
        return torch.stack([formula(inputs[one], [gradient[one] for gradient in gradients]) for one in sequences])
    return formula(inputs, gradients)


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


def _by_grams_if_finite(inputs: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    total = _by_grams(inputs, gradients)
    return total if _is_finite(total) else _by_pieces(inputs, gradients)


def _by_grams(inputs: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """By block columns, from the diagonal down: the Gram matrices are symmetric and never in memory as a whole."""
    block = _block(inputs.device)
    total = torch.zeros(inputs.shape[:-2], dtype=torch.float64, device=place_of_sums(inputs.device))
    for first in range(0, inputs.shape[-2], block):
        below, columns = (..., slice(first, None), slice(None)), (..., slice(first, first + block), slice(None))
        products = _sum_of_products([(inputs[below], inputs[columns].mT)])
        products *= _sum_of_products([(gradient[below], gradient[columns].mT) for gradient in gradients])
        # Within a row a float32 sum is as accurate as the entries; float64 for all entries would need a large temporary.
        rows = exact(products.sum(dim=-1))
        total += rows[..., :block].sum(dim=-1) + 2 * rows[..., block:].sum(dim=-1)
    return total.clamp_min_(0)  # rounding can make a zero norm slightly negative


def _by_pieces(inputs: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Some rows of each gradient at a time, so that the temporaries are small and stay in the cache."""
    rows = max(1, _piece_elements(inputs.device) // max(1, inputs.numel() // inputs.shape[-2]))
    total = torch.zeros(inputs.shape[:-2], dtype=torch.float64, device=place_of_sums(inputs.device))
    for gradient in gradients:
        for piece in gradient.mT.split(rows, dim=-2):
            formed = _sum_of_products([(piece, inputs)])
            total += torch.linalg.vector_norm(_norms_of_rows(formed), dim=-1).square()
    return total


def _norms_of_rows(matrix: torch.Tensor) -> torch.Tensor:
    """``[..., rows]`` float64; computed in float32, which is several times as fast, where the squares fit into it."""
    rows = torch.linalg.vector_norm(matrix, dim=-1, dtype=torch.promote_types(matrix.dtype, torch.float32))
    return exact(rows) if _is_finite(rows) else torch.linalg.vector_norm(exact(matrix), dim=-1)


def _is_finite(numbers: torch.Tensor) -> bool:
    return numbers.device.type != "cpu" or bool(numbers.isfinite().all())


def _block(device: torch.device) -> int:
    """Tokens per block. Small blocks compute less above the diagonal; a GPU needs fewer and larger kernels."""
    return 128 if device.type == "cpu" else 512


def _piece_elements(device: torch.device) -> int:
    return 2**20 if device.type == "cpu" else 2**24


def _multipliable(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.float() if matrix.dtype in _HALF and not matrix.is_cuda else matrix


def _sum_of_products(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """``sum of a @ b``, accumulated in at least float32; of matrices, or of batches of them."""
    total = None
    for a, b in pairs:
        is_batch = a.ndim == 3
        if a.dtype in _HALF:  # CUDA only (see `_multipliable`), as is out_dtype
            product = (torch.bmm if is_batch else torch.mm)(a, b, out_dtype=torch.float32)
            total = product if total is None else total.add_(product)
        elif total is None:
            total = a @ b
        else:
            total = total.baddbmm_(a, b) if is_batch else total.addmm_(a, b)
    assert total is not None
    return total
