"""Sum of the absolute weights of the layer's matrices (a baseline of Shortened LLaMA, arXiv 2402.02834)."""

from __future__ import annotations

import torch

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine import Need


class Magnitude(ScoreCriterion):
    """``sum of abs(W)`` over the layer's parameters W with two or more dimensions."""

    needs = Need.WEIGHTS

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        super().__init__(num_layers, seed)
        self._sums = [0.0] * num_layers

    def on_weight(self, layer: int, weight: torch.Tensor) -> None:
        if weight.ndim >= 2:
            self._sums[layer] += float(torch.linalg.vector_norm(weight.float(), ord=1, dtype=torch.float64))

    def scores(self) -> list[float]:
        return list(self._sums)


CRITERION = Magnitude
