"""Fisher information of a factor on every channel of what the layer adds (Theis et al., arXiv 1801.05787)."""

from __future__ import annotations

import torch

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine import Batch, Need
from sglp_llm.engine.totals import LayerTotals
from sglp_llm.method.exact import exact
from sglp_llm.processes import Processes


class Fisher(ScoreCriterion):
    """``1/2 sum_c (sum_t a_tc dLoss/da_tc)^2``, the mean over sequences, where ``a = x_{l+1} - x_l`` is what the layer adds.

    Theis et al. score a channel of a convolution by it, with its pixels in the place of the positions t, and zero-cost proxies
    (Abdelfattah et al., arXiv 2101.08134) sum it over channels, as here. Loss is the mean over the predictions of one sequence.

    Args:
        num_layers: Number of decoder layers.
        seed: Not used.
    """

    needs = Need.STATE_GRADIENTS

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        super().__init__(num_layers, seed)
        self._sums, self._sequences = LayerTotals(num_layers), [0] * num_layers
        self._scores = [0.0] * num_layers

    def on_state_gradient(
        self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        slopes = batch.real(exact(gradient) * (exact(leaving) - exact(entering)))
        self._sums.add(layer, slopes.sum(dim=1).square().sum() / 2)
        self._sequences[layer] += batch.size

    def on_pass_end(self, processes: Processes) -> None:
        counts = torch.tensor(self._sequences, dtype=torch.float64)
        sums, counts = processes.sum(torch.stack([self._sums.on_host(), counts]))
        self._scores = (sums / counts).tolist()

    def scores(self) -> list[float]:
        return self._scores


CRITERION = Fisher
