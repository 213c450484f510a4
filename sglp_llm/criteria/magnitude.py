"""Sum of the absolute weights of the layer's matrices (a baseline of Shortened LLaMA, arXiv 2402.02834)."""

from __future__ import annotations

import torch

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine import Need
from sglp_llm.engine.totals import LayerTotals
from sglp_llm.method.exact import exact


class Magnitude(ScoreCriterion):
    """``sum of abs(W)`` over the layer's parameters W with two or more dimensions."""

    needs = Need.WEIGHTS

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        super().__init__(num_layers, seed)
        self._sums = LayerTotals(num_layers)

    def on_weight(self, layer: int, weight: torch.Tensor) -> None:
        if weight.ndim >= 2:
            self._sums.add(layer, exact(torch.linalg.vector_norm(weight.float(), ord=1, dim=-1)).sum())

    def scores(self) -> list[float]:
        scores: list[float] = self._sums.on_host().tolist()
        return scores


CRITERION = Magnitude
