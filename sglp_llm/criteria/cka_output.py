"""Greedy removal by the CKA between the model's output with and without the layer (Pons et al., arXiv 2405.17081)."""

from __future__ import annotations

from collections.abc import Sequence

from sglp_llm.criteria.base import GreedyCriterion
from sglp_llm.engine import Need
from sglp_llm.method.similarity import check_kernel
from sglp_llm.trials import Removed
from sglp_llm.trials.measures import OutputCKA


class GreedyOutputCKA(GreedyCriterion):
    """Compares x_L (before the final norm) with and without one more layer; removes the layer with the most similar x_L.

    Args:
        num_layers: Number of decoder layers.
        seed: Not used.
        kernel: CKA kernel.
        sequences: Calibration sequences per CKA minibatch.
        positions: Positions per sequence.
    """

    needs = Need.TRIALS

    def __init__(
        self, num_layers: int, seed: int = 0, *, kernel: str = "cosine", sequences: int = 8, positions: int = 64
    ) -> None:
        super().__init__(num_layers, seed)
        self._settings = check_kernel(kernel), sequences, positions

    def costs_of(self, removed: Removed, sets: Sequence[Removed]) -> dict[Removed, float]:
        measure = OutputCKA(removed, *self._settings)
        self._trials.run(sets, measure)
        return {each: -similarity for each, similarity in measure.similarities().items()}


CRITERION = GreedyOutputCKA
