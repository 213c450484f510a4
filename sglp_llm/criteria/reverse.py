"""Removes the last layers first: the baseline that uses only the depth."""

from __future__ import annotations

from sglp_llm.criteria.base import ScoreCriterion


class Reverse(ScoreCriterion):
    """``L - 1 - l``."""

    def scores(self) -> list[float]:
        return [float(self.num_layers - 1 - layer) for layer in range(self.num_layers)]


CRITERION = Reverse
