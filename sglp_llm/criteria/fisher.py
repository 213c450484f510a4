"""Fisher information of a factor on every channel of what the layer adds (Theis et al., arXiv 1801.05787)."""

from __future__ import annotations

import torch

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine import Batch, Need
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
        self._totals = torch.zeros(num_layers, 2, dtype=torch.float64)  # sum over sequences, number of sequences

    def on_state_gradient(
        self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        slopes = (gradient.double() * (leaving.double() - entering.double()))[0]
        if batch.mask is not None:
            slopes = slopes[batch.mask[0].to(slopes.device)]
        self._totals[layer, 0] += slopes.sum(dim=0).square().sum().cpu() / 2
        self._totals[layer, 1] += 1

    def on_pass_end(self, processes: Processes) -> None:
        self._totals = processes.sum(self._totals)

    def scores(self) -> list[float]:
        return [total / count for total, count in self._totals.tolist()]


CRITERION = Fisher
