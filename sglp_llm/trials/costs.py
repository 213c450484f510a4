"""The mean cost of removing sets of layers, over a number of sequences that can be extended for each set."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from itertools import groupby

from sglp_llm.trials.measures import KLMeasure, LossMeasure
from sglp_llm.trials.observer import Removed
from sglp_llm.trials.trials import Trials

OBJECTIVES = {"kl": KLMeasure, "loss": LossMeasure}


class TrialCosts:
    """The mean cost of sets of removed layers over the first sequences of a part of the calibration set.

    Args:
        trials: Runs the trials.
        objective: One of `OBJECTIVES`.
        part: Indices of the sequences.

    Attributes:
        tokens: Number of trial tokens so far, summed over sets and sequences.
    """

    def __init__(self, trials: Trials, objective: str, part: range) -> None:
        self._trials, self._objective, self._part = trials, objective, part
        self._length = trials.calibration.input_ids.shape[1]
        self._sums: dict[Removed, float] = {}
        self._counts: dict[Removed, int] = {}
        self.tokens = 0

    def extend(self, sets: Iterable[Removed], count: int) -> None:
        """Runs each set on those of the part's first ``count`` sequences that it has not run on yet."""
        by_done = sorted(set(sets), key=lambda each: (self._counts.get(each, 0), sorted(each)))
        for done, group in groupby(by_done, key=lambda each: self._counts.get(each, 0)):
            if done < count:
                self._run(list(group), self._part[done:count])

    def mean(self, removed: Removed) -> float:
        """A set's mean cost over the sequences that it ran on; infinite if any measured cost is not finite."""
        return self._sums[removed] / self._counts[removed]

    @property
    def most(self) -> int:
        """The largest number of sequences that any set ran on."""
        return max(self._counts.values())

    def ranking(self, among: Collection[Removed] | None = None) -> list[Removed]:
        """The sets that ran on the most sequences, by increasing mean cost; ties are broken by layer indices.

        Args:
            among: Ranks only these sets; ``None`` means all.
        """
        sets = self._counts if among is None else among
        most = max(self._counts[each] for each in sets)
        whole = [each for each in sets if self._counts[each] == most]
        return sorted(whole, key=lambda each: (self.mean(each), sorted(each)))

    def _run(self, sets: list[Removed], sequences: range) -> None:
        layers = [sorted(each) for each in sets]
        piece = json.dumps([self._objective, [sequences.start, sequences.stop], layers])
        means = self._trials.once(piece, len(sets), lambda: self._means(sets, sequences))
        for removed, mean in zip(sets, means, strict=True):
            cost = mean if math.isfinite(mean) else math.inf
            self._sums[removed] = self._sums.get(removed, 0.0) + cost * len(sequences)
            self._counts[removed] = self._counts.get(removed, 0) + len(sequences)
        self.tokens += len(sets) * len(sequences) * self._length

    def _means(self, sets: list[Removed], sequences: range) -> list[float]:
        measure = OBJECTIVES[self._objective]()
        self._trials.run(sets, measure, "Searching", sequences)
        means = measure.means()
        return [means[removed] for removed in sets]
