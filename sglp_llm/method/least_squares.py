"""Weighted ridge regression for a linear map of one branch of the residual stream.

Rows are tokens. With ``M`` the branch's output, ``x`` the hidden states that ``M`` is one summand of, and ``y`` the target
hidden states, all ``[n, D]``:

    T = argmin sum_t w_t ||M_t T + (x_t - M_t) - y_t||^2 + lambda ||T - I||_F^2,  w_t = 1 / ||y_t||^2

The solution ``T - I = (M'WM + lambda I)^-1 M'W (y - x)`` and the error of any ``T`` depend on the rows only through sums over
rows. Only these sums are kept, in float64. The weights ``w_t`` make the error relative, so that a few tokens with massive
activations do not dominate the fit (our choice).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglp_llm.method.exact import exact, place_of_sums
from sglp_llm.processes import Processes

RIDGES = tuple(10.0**power for power in range(-5, 2))
"""Values of lambda to try, in units of the mean diagonal element of ``M'WM``. Infinity (``T = I``) is always tried too."""

_ROWS = 1024  # converted to float64 at a time


class NormalEquations(ABC):
    """The sums over rows that a fit needs. Each subclass allows one kind of map.

    Attributes:
        gram: ``M'WM``, or its diagonal if the map is diagonal, float64.
        cross: ``M'W (y - x)``, or its diagonal if the map is diagonal, float64.
        start: ``sum_t w_t ||x_t - y_t||^2``, the error of ``T = I``; a float64 scalar.
        rows: Number of rows added; a float64 scalar.
    """

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        device = place_of_sums(device)
        self.gram = torch.zeros(*shape, dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.gram)
        self.start = torch.zeros((), dtype=torch.float64, device=device)
        self.rows = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, part: Tensor, whole: Tensor, target: Tensor) -> None:
        """Adds rows. A row whose target is 0 has no relative error and gets weight 0.

        Args:
            part: M, ``[rows, D]``.
            whole: x, ``[rows, D]``.
            target: y, ``[rows, D]``.
        """
        for rows in zip(part.split(_ROWS), whole.split(_ROWS), target.split(_ROWS), strict=True):
            self._add(*(exact(each) for each in rows))

    def _add(self, part: Tensor, whole: Tensor, target: Tensor) -> None:
        norms = target.square().sum(dim=1, keepdim=True)
        weights = torch.where(norms > 0, 1 / norms, 0)
        missing = target - whole
        gram, cross = self._products(part, weights * part, weights * missing)
        self.gram += gram
        self.cross += cross
        self.start += (weights * missing.square()).sum()
        self.rows += len(part)

    def gather(self, processes: Processes) -> None:
        """Sums over the rows of all processes; a collective call."""
        for name in ("gram", "cross", "start", "rows"):
            setattr(self, name, processes.sum(getattr(self, name)))

    @property
    def is_finite(self) -> bool:
        """Whether all sums are finite, that is, whether every row was."""
        return all(bool(total.isfinite().all()) for total in (self.gram, self.cross, self.start))

    @property
    @abstractmethod
    def unit(self) -> float:
        """The mean diagonal element of the matrix that is inverted."""

    @abstractmethod
    def change(self, ridge: float) -> Tensor:
        """The optimal ``T - I`` for ``lambda = ridge * unit``: ``[D, D]``, or its diagonal ``[D]`` if the map is diagonal."""

    @abstractmethod
    def error(self, change: Tensor) -> float:
        """``sum_t w_t ||M_t T + (x_t - M_t) - y_t||^2`` for ``T - I = change``."""

    @abstractmethod
    def _products(self, part: Tensor, weighted: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
        """The contribution of some rows to ``gram`` and ``cross``, from M, WM and W(y - x), each ``[rows, D]``."""


class MatrixEquations(NormalEquations):
    """T is any matrix. Holds two float64 matrices, ``[D, D]`` and ``[D, outputs]``.

    With ``outputs`` the rows M are what a linear layer gets, whose outputs are a summand of x, and the solution is the change of
    its matrix.

    Args:
        width: D.
        device: Device of the sums.
        outputs: Width of x and y; ``None`` = D.
    """

    def __init__(self, width: int, device: torch.device, outputs: int | None = None) -> None:
        super().__init__((width, width), device)
        if outputs is not None:
            self.cross = torch.zeros(width, outputs, dtype=torch.float64, device=self.gram.device)

    @property
    def unit(self) -> float:
        return float(self.gram.diagonal().mean())

    def change(self, ridge: float) -> Tensor:
        regular = self.gram.clone()
        regular.diagonal().add_(ridge * self.unit)
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(regular))

    def error(self, change: Tensor) -> float:
        return float((change * (self.gram @ change - 2 * self.cross)).sum() + self.start)

    def _products(self, part: Tensor, weighted: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
        return part.T @ weighted, part.T @ missing


class ChannelEquations(NormalEquations):
    """T is diagonal: one factor per channel.

    Args:
        width: D.
        device: Device of the sums.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__((width,), device)

    @property
    def unit(self) -> float:
        return float(self.gram.mean())

    def change(self, ridge: float) -> Tensor:
        return self.cross / (self.gram + ridge * self.unit)

    def error(self, change: Tensor) -> float:
        return float((change * (self.gram * change - 2 * self.cross)).sum() + self.start)

    def _products(self, part: Tensor, weighted: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
        return (part * weighted).sum(dim=0), (part * missing).sum(dim=0)


class FactorEquations(ChannelEquations):
    """T is a multiple of the identity: one factor for all channels."""

    @property
    def unit(self) -> float:
        return float(self.gram.sum())

    def change(self, ridge: float) -> Tensor:
        return (self.cross.sum() / (self.gram.sum() + ridge * self.unit)).expand_as(self.cross)


@dataclass(frozen=True)
class ChosenRidge:
    """A fitted map, with the ridge that has the lowest held-out error.

    Attributes:
        ridge: lambda in units of the mean diagonal element; ``None`` means infinity.
        change: ``T - I``; ``None`` if no ridge gives a lower held-out error than ``T = I``.
        errors: Weighted error per row: (without, with) the map on the fit rows, then on the held-out rows.
    """

    ridge: float | None
    change: Tensor | None
    errors: tuple[tuple[float, float], tuple[float, float]]


def best_ridge(fit: NormalEquations, held_out: NormalEquations, ridges: Sequence[float] = RIDGES) -> ChosenRidge:
    """Chooses the ridge by the error on held-out rows, computed from their sums.

    Args:
        fit: Equations of the rows that the map is fitted on.
        held_out: Equations of the same class for other rows.
        ridges: Values to try besides infinity.
    """
    best: tuple[float | None, Tensor | None] = (None, None)
    lowest = float(held_out.start)
    for ridge in ridges if fit.unit > 0 else ():
        change = fit.change(ridge)
        error = held_out.error(change)
        if error < lowest:
            lowest, best = error, (ridge, change)
    ridge_, change_ = best
    pairs = [
        (
            float(part.start / part.rows),
            (float(part.start) if change_ is None else part.error(change_)) / float(part.rows),
        )
        for part in (fit, held_out)
    ]
    return ChosenRidge(ridge_, change_, (pairs[0], pairs[1]))
