"""Gradient norm of the layer, averaged over calibration sequences (SGLP, arXiv 2410.14720)."""

from __future__ import annotations

import torch

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine.observer import Batch, Need


class GradNorm(ScoreCriterion):
    """``g_l = mean over sequences of sqrt(sum over the layer's parameters p of ||dLoss/dp||^2)``.

    Loss is the mean token negative log-likelihood of one sequence. The unit matters: the norm of a sum over several
    sequences gives another ranking.
    """

    needs = Need.GRADIENTS

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        super().__init__(num_layers, seed)
        self._norms: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self._totals = [0.0] * num_layers
        self._sequences = 0

    def on_gradient(self, layer: int, batch: Batch, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        # Row by row, because a float32 sum over a whole matrix loses up to 1e-3 of it.
        rows = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32)
        self._norms[layer].append(torch.linalg.vector_norm(rows, dtype=torch.float64))

    def on_batch_end(self, batch: Batch) -> None:
        assert batch.size == 1, "a gradient norm is that of one sequence"
        for layer, norms in enumerate(self._norms):
            self._totals[layer] += float(torch.linalg.vector_norm(torch.stack(norms)))
            norms.clear()
        self._sequences += 1

    def scores(self) -> list[float]:
        return [total / self._sequences for total in self._totals]


CRITERION = GradNorm
