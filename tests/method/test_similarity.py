"""CKA against METHOD's formula in plain loops, and against its invariances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglp_llm.errors import UserError
from sglp_llm.method.similarity import KERNELS, CKAAccumulator


def straight_line_cka(minibatches: list[list[torch.Tensor]], kernel: str) -> torch.Tensor:
    """The definition, element by element in float64: no matrix identities shared with the implementation."""
    layers = len(minibatches[0])
    hsic = [[0.0] * layers for _ in range(layers)]
    for minibatch in minibatches:
        grams = []
        for x in minibatch:
            rows = [[float(value) for value in row] for row in x]
            if kernel == "cosine":
                rows = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in rows]
            n = len(rows)
            grams.append(
                [
                    [0.0 if a == b else sum(p * q for p, q in zip(rows[a], rows[b], strict=True)) for b in range(n)]
                    for a in range(n)
                ]
            )
        n = len(grams[0])
        for i, k in enumerate(grams):
            for j, m in enumerate(grams):
                trace = sum(k[a][b] * m[b][a] for a in range(n) for b in range(n))
                sum_k, sum_m = sum(map(sum, k)), sum(map(sum, m))
                cross = sum(k[a][b] * m[b][c] for a in range(n) for b in range(n) for c in range(n))
                value = trace + sum_k * sum_m / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)
                hsic[i][j] += value / (n * (n - 3)) / len(minibatches)
    values = [[hsic[i][j] / math.sqrt(hsic[i][i] * hsic[j][j]) for j in range(layers)] for i in range(layers)]
    return torch.tensor(values, dtype=torch.float64)


def cka(minibatches: list[list[torch.Tensor]], kernel: str) -> torch.Tensor:
    accumulator = CKAAccumulator(kernel)
    for minibatch in minibatches:
        accumulator.update(minibatch)
    return accumulator.result().values


def random_minibatches(
    generator: torch.Generator, minibatches: int, layers: int, n: int, width: int
) -> list[list[torch.Tensor]]:
    """A random walk over the layers, as a residual stream is."""
    result = []
    for _ in range(minibatches):
        steps = torch.randn(layers, n, width, generator=generator)
        result.append(list(steps.cumsum(dim=0)))
    return result


@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_formula_in_a_plain_loop(kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    minibatches = random_minibatches(generator, minibatches=3, layers=4, n=12, width=7)
    minibatches[2] = [rows[:9] for rows in minibatches[2]]  # a smaller last minibatch
    values = cka(minibatches, kernel)
    assert values.shape == (4, 4)
    torch.testing.assert_close(values, straight_line_cka(minibatches, kernel), rtol=0, atol=1e-6)
    torch.testing.assert_close(values.diagonal(), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(5, 20),
    width=st.integers(2, 9),
    scale=st.floats(1e-3, 1e3),
    kernel=st.sampled_from(KERNELS),
)
def test_invariant_to_orthogonal_maps_and_isotropic_scaling(
    seed: int, n: int, width: int, scale: float, kernel: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(n, width, generator=generator, dtype=torch.float64) for _ in range(3)]
    moved = []
    for rows in layers:
        orthogonal, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        moved.append(scale * rows @ orthogonal)
    try:
        plain = cka([layers], kernel)
    except UserError:
        return  # the unbiased self-similarity of few random rows may be negative: CKA is not defined there
    torch.testing.assert_close(cka([moved], kernel), plain, rtol=1e-6, atol=1e-6)


def test_cosine_kernel_ignores_row_norms_and_linear_does_not() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 16, 8, generator=generator)
    massive = second.clone()
    massive[0] *= 1000
    assert torch.allclose(cka([[first, massive]], "cosine"), cka([[first, second]], "cosine"))
    assert not torch.allclose(cka([[first, massive]], "linear"), cka([[first, second]], "linear"), atol=0.05)


def test_representations_of_low_precision_and_different_widths() -> None:
    generator = torch.Generator().manual_seed(2)
    wide, narrow = torch.randn(16, 8, generator=generator), torch.randn(16, 5, generator=generator).to(torch.bfloat16)
    expected = straight_line_cka([[wide, narrow]], "linear")
    torch.testing.assert_close(cka([[wide, narrow]], "linear"), expected, rtol=0, atol=1e-6)


def test_refusals() -> None:
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    with pytest.raises(UserError, match="at least 4 tokens"):
        CKAAccumulator().update([rows[:3], rows[:3]])
    with pytest.raises(UserError, match="decoder layer 1 is not finite"):
        CKAAccumulator().update([rows, rows * torch.nan])
    constant = CKAAccumulator("linear")
    constant.update([rows, torch.ones(8, 4)])
    with pytest.raises(UserError, match="decoder layer 1 gives all tokens the same"):
        constant.result()
