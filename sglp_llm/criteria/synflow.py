"""Synaptic flow through the layer's linears, without attention and norms (SynFlow: Tanaka et al., arXiv 2006.05467)."""

from __future__ import annotations

from collections.abc import Sequence

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine import Need


class Synflow(ScoreCriterion):
    """``sum of W * dR/dW / R`` over the layer's matrices; R is the linear network's output for a vector of ones.

    See `sglp_llm.engine.synaptic_flow` for what of a decoder layer is a linear network. It looks at no text.

    Args:
        num_layers: Number of decoder layers.
        seed: Not used.
    """

    needs = Need.SYNAPTIC_FLOW

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        super().__init__(num_layers, seed)
        self._scores = [0.0] * num_layers

    def on_synaptic_flow(self, flows: Sequence[float]) -> None:
        self._scores = list(flows)

    def scores(self) -> list[float]:
        return self._scores


CRITERION = Synflow
