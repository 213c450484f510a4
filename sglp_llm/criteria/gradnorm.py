"""Gradient norm of the layer, averaged over calibration sequences (SGLP, arXiv 2410.14720)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine import Batch, Need
from sglp_llm.engine.norms.ghost import squared_norm
from sglp_llm.engine.totals import LayerTotals
from sglp_llm.errors import unknown
from sglp_llm.processes import Processes

NORMS = ("layer", "tensors", "relative")


class GradNorm(ScoreCriterion):
    """``g_l = mean over sequences of sqrt(sum over the layer's parameters p of ||dLoss/dp||^2)``.

    Loss is the mean token negative log-likelihood of one sequence. Taking the norm per sequence matters: the norm of a gradient
    summed over several sequences gives a different ranking.

    Args:
        num_layers: Number of decoder layers.
        seed: Not used.
        norm: ``layer`` is the above. Two variants (ours): ``tensors``, the mean of the gradient norms of the layer's
            parameters; ``relative``, the layer's gradient norm divided by the norm of its weights.
    """

    needs = Need.GRADIENT_NORMS

    def __init__(self, num_layers: int, seed: int = 0, *, norm: str = "layer") -> None:
        super().__init__(num_layers, seed)
        if norm not in NORMS:
            raise unknown("norm of gradnorm", norm, NORMS)
        self._norm = norm
        if norm == "tensors":
            self.needs = Need.GRADIENTS  # one norm may cover several parameters together
        self._squares: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]  # of the current sequences
        self._first: list[int | None] = [None] * num_layers  # the first of the current sequences
        self._norms, self._weights = LayerTotals(num_layers), LayerTotals(num_layers)
        self._sequences, self._parameters = [0] * num_layers, [1] * num_layers
        self._means = [0.0] * num_layers

    def on_gradient_norm(self, layer: int, batch: Batch, name: str, squared: torch.Tensor) -> None:
        if self._first[layer] != batch.first:
            self._finish_sequences(layer)
            self._first[layer] = batch.first
        self._squares[layer].append(squared)

    def on_gradient(self, layer: int, batch: Batch, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        self.on_gradient_norm(layer, batch, name, squared_norm(gradient)[None])

    def on_gradients_end(self, layer: int, weights: Mapping[str, torch.Tensor], processes: Processes) -> None:
        self._finish_sequences(layer)
        if self._norm == "tensors":
            self._parameters[layer] = len(weights)
        if self._norm == "relative":
            for weight in weights.values():
                self._weights.add(layer, squared_norm(weight))

    def on_pass_end(self, processes: Processes) -> None:
        counts = torch.tensor(self._sequences, dtype=torch.float64)
        norms, counts = processes.sum(torch.stack([self._norms.on_host(), counts]))
        means = norms / counts / torch.tensor(self._parameters)
        if self._norm == "relative":
            means /= self._weights.on_host().sqrt()
        self._means = means.tolist()

    def _finish_sequences(self, layer: int) -> None:
        if squares := self._squares[layer]:
            stacked = torch.stack(squares)  # [parameters, sequences]
            norms = stacked.sqrt().sum(dim=0) if self._norm == "tensors" else stacked.sum(dim=0).sqrt()
            self._norms.add(layer, norms.sum())
            self._sequences[layer] += len(norms)
            squares.clear()

    def scores(self) -> list[float]:
        return self._means


CRITERION = GradNorm
