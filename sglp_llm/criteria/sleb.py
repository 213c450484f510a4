"""Greedy removal by the loss of the pruned model (SLEB, arXiv 2402.09025)."""

from __future__ import annotations

from collections.abc import Sequence

from sglp_llm.criteria.base import GreedyCriterion
from sglp_llm.engine.measures import LossMeasure
from sglp_llm.engine.observer import Need


class GreedyLoss(GreedyCriterion):
    """Removes the layer whose removal hurts the mean loss of the sequences least, then tries the others again."""

    needs = Need.TRIALS

    def costs(self, removed: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        measure = LossMeasure()
        self._trials.run(removed, candidates, measure)
        return measure.means()


CRITERION = GreedyLoss
