"""First-order Taylor importance of the layer's weights (Shortened LLaMA, arXiv 2402.02834)."""

from __future__ import annotations

import torch

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine.observer import Batch, Need
from sglp_llm.errors import unknown

ACCUMULATORS = ("device", "host")


class Taylor(ScoreCriterion):
    """``sum of abs(W * sum_b dLoss_b/dW)`` over the elements of the layer's parameters W of two or more dimensions.

    Unlike a norm of each sequence's gradient, the sum over sequences must be kept: one float32 number a weight.

    Args:
        num_layers: Number of decoder layers.
        seed: Not used.
        accumulator: Where the summed gradients are kept: ``device`` (where the layer is) or ``host``.
    """

    needs = Need.GRADIENTS

    def __init__(self, num_layers: int, seed: int = 0, *, accumulator: str = "device") -> None:
        super().__init__(num_layers, seed)
        if accumulator not in ACCUMULATORS:
            raise unknown("accumulator of taylor", accumulator, ACCUMULATORS)
        self._on_host = accumulator == "host"
        self._weights: list[dict[str, torch.Tensor]] = [{} for _ in range(num_layers)]
        self._sums: list[dict[str, torch.Tensor]] = [{} for _ in range(num_layers)]

    def on_gradient(self, layer: int, batch: Batch, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        if weight.ndim < 2:
            return
        if name in self._sums[layer]:
            self._sums[layer][name] += gradient.to(self._sums[layer][name].device)
        else:
            copy = gradient.to("cpu" if self._on_host else gradient.device, torch.float32, copy=True)
            self._weights[layer][name], self._sums[layer][name] = weight, copy

    def scores(self) -> list[float]:
        return [
            sum(self._score(weights[name], gradient) for name, gradient in sums.items())
            for weights, sums in zip(self._weights, self._sums, strict=True)
        ]

    @staticmethod
    def _score(weight: torch.Tensor, gradient: torch.Tensor) -> float:
        products = weight.detach().to(gradient.device, torch.float32) * gradient
        return float(torch.linalg.vector_norm(products, ord=1, dim=-1).sum(dtype=torch.float64))


CRITERION = Taylor
