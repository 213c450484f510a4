"""Connection sensitivity of the layer's weights (SNIP: Lee et al., arXiv 1810.02340)."""

from __future__ import annotations

import torch

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine import Batch, Need
from sglp_llm.engine.totals import LayerTotals
from sglp_llm.method.exact import exact
from sglp_llm.processes import Processes


class Snip(ScoreCriterion):
    """``sum over sequences of abs(W * dLoss/dW)`` over the elements of the layer's parameters W with two or more dimensions.

    ``taylor`` adds the gradients of all sequences before it takes absolute values, and needs one number per weight for it; here
    every sequence is a minibatch of its own.

    Args:
        num_layers: Number of decoder layers.
        seed: Not used.
    """

    needs = Need.GRADIENTS

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        super().__init__(num_layers, seed)
        self._sums = LayerTotals(num_layers)
        self._scores = [0.0] * num_layers

    def on_gradient(self, layer: int, batch: Batch, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        if weight.ndim >= 2:
            products = weight.detach().float() * gradient.float()
            self._sums.add(layer, exact(torch.linalg.vector_norm(products, ord=1, dim=-1)).sum())

    def on_pass_end(self, processes: Processes) -> None:
        self._scores = processes.sum(self._sums.on_host()).tolist()

    def scores(self) -> list[float]:
        return self._scores


CRITERION = Snip
