"""Ridge regression by streamed sums. Oracle: numpy's least squares on the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglp_llm.method.least_squares import (
    RIDGES,
    ChannelEquations,
    FactorEquations,
    MatrixEquations,
    NormalEquations,
    best_ridge,
)

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("kind", [MatrixEquations, ChannelEquations, FactorEquations])
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rows(count: int, seed: int, width: int = 5, noise: float = 0.3) -> Rows:
    """A part, a whole, and a target that another map of the part would nearly reach; every row has a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    part, base, rest = (torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(3))
    truth = torch.eye(width, dtype=torch.float64) + 0.5 * torch.randn(
        width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64
    )
    scale = torch.logspace(-1, 1, count, dtype=torch.float64)[:, None]
    part, base = part * scale, base * scale
    return part, part + base, part @ truth + base + noise * scale * rest


def filled(kind: type, given: Rows, batch: int = 7) -> NormalEquations:
    equations: NormalEquations = kind(given[0].shape[1], CPU)
    for pieces in zip(*(each.split(batch) for each in given), strict=True):
        equations.add(*pieces)
    return equations


def by_numpy(kind: type, given: Rows, ridge: float) -> np.ndarray:
    """``T - I``: the stacked system ``[sqrt(w) M; sqrt(lambda) I] T = [sqrt(w) (y - x + M); sqrt(lambda) I]``."""
    part, whole, target = (each.numpy() for each in given)
    width = part.shape[1]
    root = 1 / np.linalg.norm(target, axis=1, keepdims=True)
    left, right = root * part, root * (target - whole + part)
    if kind is MatrixEquations:
        penalty = np.sqrt(ridge * np.mean(np.sum(left**2, axis=0)))
        stacked = np.vstack([left, penalty * np.eye(width)]), np.vstack([right, penalty * np.eye(width)])
        return np.linalg.lstsq(*stacked, rcond=None)[0] - np.eye(width)
    if kind is ChannelEquations:
        penalty = np.sqrt(ridge * np.mean(np.sum(left**2, axis=0)))
        columns = [
            np.linalg.lstsq(np.append(left[:, [d]], [[penalty]], 0), np.append(right[:, d], penalty), rcond=None)[0]
            for d in range(width)
        ]
        return np.concatenate(columns) - 1
    penalty = np.sqrt(ridge * np.sum(left**2))
    system = np.append(left.reshape(-1, 1), [[penalty]], 0), np.append(right.reshape(-1), penalty)
    return np.full(width, np.linalg.lstsq(*system, rcond=None)[0][0] - 1)


def error_by_numpy(given: Rows, change: np.ndarray) -> float:
    part, whole, target = (each.numpy() for each in given)
    moved = part @ change if change.ndim > 1 else part * change
    return float(np.sum(np.sum((whole + moved - target) ** 2, axis=1) / np.sum(target**2, axis=1)))


@KINDS
@pytest.mark.parametrize("ridge", [1e-5, 0.1, 10.0])
def test_the_map_and_its_error_are_those_of_numpy_on_the_rows(kind: type, ridge: float) -> None:
    given, other = rows(40, 1), rows(12, 2)
    equations = filled(kind, given)
    expected = by_numpy(kind, given, ridge)
    change = equations.change(ridge)
    assert change.shape == expected.shape
    np.testing.assert_allclose(change.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert equations.error(change) == pytest.approx(error_by_numpy(given, expected), rel=1e-9)
    assert filled(kind, other).error(change) == pytest.approx(error_by_numpy(other, expected), rel=1e-9)


@KINDS
def test_batches_do_not_matter(kind: type) -> None:
    given = rows(40, 1)
    one, many = filled(kind, given, 40), filled(kind, given, 1)
    torch.testing.assert_close(one.change(0.1), many.change(0.1))
    assert float(one.start) == pytest.approx(float(many.start), rel=1e-12)


@KINDS
def test_the_ridge_is_the_best_of_all_on_rows_that_were_not_fitted(kind: type) -> None:
    given, other = rows(12, 3, noise=2.0), rows(30, 4, noise=2.0)
    found = best_ridge(filled(kind, given), filled(kind, other))
    errors = {ridge: error_by_numpy(other, by_numpy(kind, given, ridge)) for ridge in RIDGES}
    best = min(errors, key=lambda ridge: errors[ridge])
    assert found.ridge == best
    assert found.errors[1] == pytest.approx((error_by_numpy(other, np.zeros((5, 5))) / 30, errors[best] / 30), rel=1e-9)
    assert found.errors[1][1] < found.errors[1][0]


@KINDS
def test_no_change_wins_where_every_other_map_is_worse_elsewhere(kind: type) -> None:
    part, whole, _ = rows(20, 5)
    # What is missing here is too much there: whatever brings the one closer takes the other farther away.
    found = best_ridge(filled(kind, (part, whole, whole + part)), filled(kind, (part, whole, whole - part)))
    assert found.ridge is None
    assert found.change is None
    assert found.errors[0][0] == found.errors[0][1] > 0


@KINDS
def test_nothing_to_map_is_left_as_it_is(kind: type) -> None:
    _, whole, target = rows(20, 5)
    equations = filled(kind, (torch.zeros_like(whole), whole, target))
    assert best_ridge(equations, equations).change is None


def test_a_row_with_massive_activations_does_not_own_the_fit() -> None:
    part, whole, target = rows(400, 6)
    quiet = filled(MatrixEquations, (part, whole, target)).change(1e-5)
    generator = torch.Generator().manual_seed(7)
    massive = [1e4 * torch.randn(1, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    loud = tuple(torch.cat([each, row]) for each, row in zip((part, whole, target), massive, strict=True))
    found = filled(MatrixEquations, loud).change(1e-5)  # type: ignore[arg-type]
    unweighted = torch.linalg.lstsq(loud[0], loud[2] - loud[1]).solution
    assert (found - quiet).norm() < 0.1 * quiet.norm()
    assert (unweighted - quiet).norm() > 0.5 * quiet.norm()


def test_a_target_of_zero_has_no_relative_error() -> None:
    part, whole, target = rows(20, 8)
    more = tuple(
        torch.cat([each, row]) for each, row in ((part, part[:1]), (whole, whole[:1]), (target, 0 * target[:1]))
    )
    torch.testing.assert_close(
        filled(MatrixEquations, more).change(0.1), filled(MatrixEquations, rows(20, 8)).change(0.1)
    )


def test_rows_that_are_not_finite_are_noticed() -> None:
    part, whole, target = rows(20, 8)
    whole[3, 2] = float("inf")
    assert not filled(ChannelEquations, (part, whole, target)).is_finite
    assert filled(ChannelEquations, rows(20, 8)).is_finite
