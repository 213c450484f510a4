"""Effects of layers by least squares over random removals of several layers (Sememe, COLM 2026)."""

from __future__ import annotations

import random

import torch

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine import Need
from sglp_llm.errors import UserError
from sglp_llm.trials import Removed, Trials
from sglp_llm.trials.measures import LossMeasure

_REMOVALS_A_LAYER = 4


class RandomRemovals(ScoreCriterion):
    """The coefficient of a layer in a least-squares fit of the loss on what was removed.

    Each of a number of seeded random sets contains every layer with the same small probability. The mean loss of the sequences
    without a set is fitted by an intercept and one coefficient for every layer: what its removal adds on average, others being
    gone too. The whole model is one of the sets. The same sets serve all sequences, so that the mean over sequences
    of their own fits is the fit of their mean.

    Args:
        num_layers: Number of decoder layers L.
        seed: Seed of the sets.
        removals: Number of sets; 0 = 4 L.
        probability: Of every layer to be in a set.
    """

    needs = Need.TRIALS
    trial_cost = f"{_REMOVALS_A_LAYER} trials a layer"

    def __init__(self, num_layers: int, seed: int = 0, *, removals: int = 0, probability: float = 0.1) -> None:
        super().__init__(num_layers, seed)
        if removals < 0:
            raise UserError(f"removals of sememe must not be negative, not {removals}")
        if not 0 < probability < 1:
            raise UserError(f"probability of sememe must be between 0 and 1, both excluded, not {probability}")
        self._count, self._probability = removals or _REMOVALS_A_LAYER * num_layers, probability
        self._scores = [0.0] * num_layers

    def sets(self) -> list[Removed]:
        """The sets that are removed, the empty one first; the same set may be drawn twice. No set holds all layers."""
        drawn, sets = random.Random(self.seed), [frozenset[int]()]
        while len(sets) <= self._count:
            one = frozenset(layer for layer in range(self.num_layers) if drawn.random() < self._probability)
            if len(one) < self.num_layers:
                sets.append(one)
        return sets

    def on_trials(self, trials: Trials) -> None:
        sets, measure = self.sets(), LossMeasure()
        trials.run(sets, measure)
        means = measure.means()
        losses = torch.tensor([means[each] for each in sets], dtype=torch.float64)
        removed = torch.tensor(
            [[1.0, *(float(layer in each) for layer in range(self.num_layers))] for each in sets], dtype=torch.float64
        )
        # The solution of least norm: a layer that no set holds has no effect.
        fitted = torch.linalg.lstsq(removed, losses[:, None], driver="gelsd").solution[:, 0]
        self._scores = fitted[1:].tolist()

    def scores(self) -> list[float]:
        return self._scores


CRITERION = RandomRemovals
