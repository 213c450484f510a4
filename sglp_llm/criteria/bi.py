"""Block influence: 1 - cosine similarity of the hidden states before and after the layer (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

import torch

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine import Batch, Need
from sglp_llm.engine.totals import LayerTotals
from sglp_llm.method.exact import exact
from sglp_llm.processes import Processes


class BlockInfluence(ScoreCriterion):
    """``1 - mean over tokens of cos(x_l, x_{l+1})``, without padding positions."""

    needs = Need.HIDDEN_STATES

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        super().__init__(num_layers, seed)
        self._cosines, self._tokens = LayerTotals(num_layers), [0] * num_layers
        self._scores = [0.0] * num_layers

    def on_layer(self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(entering.float(), leaving.float(), dim=-1)
        self._cosines.add(layer, exact(batch.real(cosine)).sum())
        self._tokens[layer] += sum(batch.positions(cosine.shape[1]))

    def on_pass_end(self, processes: Processes) -> None:
        tokens = torch.tensor(self._tokens, dtype=torch.float64)
        cosines, tokens = processes.sum(torch.stack([self._cosines.on_host(), tokens]))
        self._scores = (1 - cosines / tokens).tolist()

    def scores(self) -> list[float]:
        return self._scores


CRITERION = BlockInfluence
