"""Seeded random scores: the baseline that any criterion must beat."""

from __future__ import annotations

from random import Random

from sglp_llm.criteria.base import ScoreCriterion


class RandomScores(ScoreCriterion):
    """Uniform in [0, 1), the same for the same seed on every machine."""

    def scores(self) -> list[float]:
        generator = Random(self.seed)
        return [generator.random() for _ in range(self.num_layers)]


CRITERION = RandomScores
