"""Greedy removal by the KL divergence of the pruned model's predictions from the whole model's (EvoPress, arXiv 2410.14649)."""

from __future__ import annotations

from collections.abc import Sequence

from sglp_llm.criteria.base import GreedyCriterion
from sglp_llm.engine import Need
from sglp_llm.trials import Removed
from sglp_llm.trials.measures import KLMeasure


class GreedyKL(GreedyCriterion):
    """Like `sleb`, with KL(dense next-token distribution || pruned), averaged over all positions of a sequence."""

    needs = Need.TRIALS

    def costs_of(self, removed: Removed, sets: Sequence[Removed]) -> dict[Removed, float]:
        measure = KLMeasure()
        self._trials.run(sets, measure)
        return measure.means()


CRITERION = GreedyKL
