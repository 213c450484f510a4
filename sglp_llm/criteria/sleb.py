"""Greedy removal by the loss of the pruned model (SLEB, arXiv 2402.09025)."""

from __future__ import annotations

from collections.abc import Sequence

from sglp_llm.criteria.base import GreedyCriterion
from sglp_llm.engine import Need
from sglp_llm.trials import Removed
from sglp_llm.trials.measures import LossMeasure


class GreedyLoss(GreedyCriterion):
    """Removes the layer whose removal raises the mean loss of the sequences least, then tries the remaining layers again."""

    needs = Need.TRIALS

    def costs_of(self, removed: Removed, sets: Sequence[Removed]) -> dict[Removed, float]:
        measure = LossMeasure()
        self._trials.run(sets, measure)
        return measure.means()


CRITERION = GreedyLoss
