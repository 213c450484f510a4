"""Block influence: 1 - cosine similarity of the hidden states before and after the layer (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

import torch

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine import Batch, Need
from sglp_llm.processes import Processes


class BlockInfluence(ScoreCriterion):
    """``1 - mean over tokens of cos(x_l, x_{l+1})``, without padding positions."""

    needs = Need.HIDDEN_STATES

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        super().__init__(num_layers, seed)
        self._totals = torch.zeros(num_layers, 2, dtype=torch.float64)  # sum and number of cosines

    def on_layer(self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(entering.float(), leaving.float(), dim=-1)
        if batch.mask is not None:
            cosine = cosine[batch.mask.to(cosine.device)]
        self._totals[layer, 0] += cosine.sum(dtype=torch.float64).cpu()
        self._totals[layer, 1] += cosine.numel()

    def on_pass_end(self, processes: Processes) -> None:
        self._totals = processes.sum(self._totals)

    def scores(self) -> list[float]:
        return [1 - cosines / tokens for cosines, tokens in self._totals.tolist()]


CRITERION = BlockInfluence
