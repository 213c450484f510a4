"""First-order Taylor importance of the layer's weights (Shortened LLaMA, arXiv 2402.02834)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine import Batch, Need
from sglp_llm.engine.totals import LayerTotals
from sglp_llm.errors import unknown
from sglp_llm.method.exact import exact
from sglp_llm.processes import Processes

ACCUMULATORS = ("device", "host")


class Taylor(ScoreCriterion):
    """``sum of abs(W * sum_b dLoss_b/dW)`` over the elements of the layer's parameters W with two or more dimensions.

    Unlike a per-sequence gradient norm, this needs the gradient summed over sequences: one float32 number per weight.

    Args:
        num_layers: Number of decoder layers.
        seed: Not used.
        accumulator: Where the summed gradients are stored: ``device`` (the layer's device) or ``host``.
    """

    needs = Need.GRADIENTS

    def __init__(self, num_layers: int, seed: int = 0, *, accumulator: str = "device") -> None:
        super().__init__(num_layers, seed)
        if accumulator not in ACCUMULATORS:
            raise unknown("accumulator of taylor", accumulator, ACCUMULATORS)
        self._on_host = accumulator == "host"
        self._sums: list[dict[str, torch.Tensor]] = [{} for _ in range(num_layers)]
        self._totals = LayerTotals(num_layers)

    def on_gradient(self, layer: int, batch: Batch, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        if weight.ndim < 2:
            return
        if name in self._sums[layer]:
            self._sums[layer][name] += gradient.to(self._sums[layer][name].device)
        else:
            self._sums[layer][name] = gradient.to(self._place(gradient), torch.float32, copy=True)

    def on_gradients_end(self, layer: int, weights: Mapping[str, torch.Tensor], processes: Processes) -> None:
        sums, self._sums[layer] = self._sums[layer], {}
        for name, weight in weights.items():
            if weight.ndim < 2:
                continue
            place = self._place(weight)  # also in a process without sequences
            mine = sums.pop(name) if name in sums else torch.zeros_like(weight, dtype=torch.float32, device=place)
            self._totals.add(layer, self._score(weight, processes.sum(mine)))

    def scores(self) -> list[float]:
        scores: list[float] = self._totals.on_host().tolist()
        return scores

    def _place(self, tensor: torch.Tensor) -> torch.device:
        return torch.device("cpu") if self._on_host else tensor.device

    @staticmethod
    def _score(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        products = weight.detach().to(gradient.device, torch.float32) * gradient
        return exact(torch.linalg.vector_norm(products, ord=1, dim=-1)).sum()


CRITERION = Taylor
