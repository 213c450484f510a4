"""Perplexity of the model without the layer (Shortened LLaMA, arXiv 2402.02834)."""

from __future__ import annotations

import math

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine import Need
from sglp_llm.trials import Trials
from sglp_llm.trials.measures import LossMeasure


class PerplexityWithout(ScoreCriterion):
    """exp of the mean loss of the sequences with only that layer removed."""

    needs = Need.TRIALS

    def on_trials(self, trials: Trials) -> None:
        measure = LossMeasure()
        trials.run([frozenset({layer}) for layer in range(self.num_layers)], measure)
        self._losses = measure.means()

    def scores(self) -> list[float]:
        # Without some layers the loss can be huge: clamp it, so that exp does not overflow.
        return [math.exp(min(self._losses[frozenset({layer})], 700.0)) for layer in range(self.num_layers)]


CRITERION = PerplexityWithout
