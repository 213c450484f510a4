"""Guided search for the set of layers without which the model predicts most nearly the same: segments and angular distances
propose, trials decide."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from typing import Any

from sglp_llm.criteria.angular import Angular
from sglp_llm.criteria.base import SetCriterion
from sglp_llm.engine.measures import KLMeasure, LossMeasure
from sglp_llm.engine.observer import Need
from sglp_llm.engine.passes import run_pass
from sglp_llm.engine.representations import CKAObserver
from sglp_llm.engine.trial_observer import Removed
from sglp_llm.engine.trials import Trials
from sglp_llm.errors import UserError, unknown
from sglp_llm.proposals import distance_of, neighbours, propose
from sglp_llm.records import Segment
from sglp_llm.segmentation import segment_layers

OBJECTIVES = {"kl": KLMeasure, "loss": LossMeasure}


class Search(SetCriterion):
    """Racing and swaps over sets of layers.

    One forward pass over the trial sequences gives the CKA segments and the angular distance between the inputs of every two
    layers. The sets with the least distance enter a race: all of them run on the first sequence, the better ones on more,
    the best on all. Then swaps of one layer of the leaders race against them, until no swap wins or the budget is spent.

    Args:
        num_layers: Number of decoder layers.
        seed: Not used: nothing is drawn.
        objective: ``kl`` to the whole model's next-token distribution, or ``loss``.
        budget: Trial tokens (``16000``, ``"16k"``) or wall time (``"5m"``, ``"30s"``) after which no new round begins; 0 means as
            many tokens as 16 trials on all trial sequences have.
        proposals: Sets that enter the first race.
        runs: Most runs of consecutive layers in a proposed set.
        beam: Leaders whose swaps are tried.
    """

    needs = Need.TRIALS

    def __init__(
        self,
        num_layers: int,
        seed: int = 0,
        *,
        objective: str = "kl",
        budget: int | str = 0,
        proposals: int = 24,
        runs: int = 3,
        beam: int = 2,
    ) -> None:
        super().__init__(num_layers, seed)
        if objective not in OBJECTIVES:
            raise unknown("objective of search", objective, list(OBJECTIVES))
        for name, value in (("proposals", proposals), ("runs", runs), ("beam", beam)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} of search must be a positive whole number, not {value!r}")
        self._objective, self._proposals, self._runs, self._beam = objective, proposals, runs, beam
        self._tokens, self._seconds = _parsed_budget(budget)
        self.trace: list[dict[str, Any]] = []

    def on_trials(self, trials: Trials) -> None:
        self._trials = trials
        sequences, length = trials.calibration.input_ids.shape
        self._length, self._sequences = length, sequences
        cka = CKAObserver(self.num_layers)
        turning = Angular(self.num_layers, tokens="all")
        run_pass(trials.model, trials.calibration, [cka, turning], progress=trials.progress, processes=trials.processes)
        self.segments: tuple[Segment, ...] = segment_layers(cka.result(), None)
        self._distances = turning.distances()
        self._costs: dict[Removed, tuple[float, int]] = {}  # sum over sequences, and how many of them

    def choose(self, n: int, removable: Sequence[int]) -> list[int]:
        return sorted(self.finalists(n, removable)[0][0])

    def finalists(self, n: int, removable: Sequence[int]) -> list[tuple[Removed, float]]:
        """The sets that ran on all trial sequences, the best first, with their mean cost."""
        among = range(removable[0], removable[-1] + 1)
        self._spent, self._start = 0, time.perf_counter()
        self._costs, self.trace = {}, []
        entrants = propose(n, among, self.segments, self._distances, self._proposals, self._runs)
        self._race(entrants, "proposals")
        tried = set(entrants)
        while not self._is_spent():
            leaders = [removed for removed, _ in self._ranking()[: self._beam]]
            swaps = {each for leader in leaders for each in neighbours(leader, among, self.segments)} - tried
            if not swaps:
                break
            entrants = sorted(swaps, key=lambda each: (distance_of(each, self._distances), sorted(each)))
            entrants = entrants[: max(2, self._proposals // 2)]
            tried |= set(entrants)
            self._race(entrants, "swaps")
            if self._ranking()[0][0] in leaders:
                break
        return self._ranking()

    def _race(self, entrants: Sequence[Removed], what: str) -> None:
        """Successive halving over sequences: the first, then up to a quarter of them, then all, for a third each time."""
        field, done = list(entrants), 0
        for stop in sorted({1, max(1, self._sequences // 4), self._sequences}):
            if stop <= done:
                continue
            self._run(field, range(done, stop))
            done = stop
            field.sort(key=lambda each: (self._mean(each), sorted(each)))
            self.trace.append(
                {
                    "round": what,
                    "sequences": stop,
                    "tried": [[sorted(each), round(self._mean(each), 6)] for each in field],
                }
            )
            field = field[: max(2, math.ceil(len(field) / 4))]

    def _run(self, sets: Sequence[Removed], sequences: range) -> None:
        measure = OBJECTIVES[self._objective]()
        self._trials.run(sets, measure, "Searching", sequences)
        for removed, mean in measure.means().items():
            total, count = self._costs.get(removed, (0.0, 0))
            self._costs[removed] = total + mean * len(sequences), count + len(sequences)
        self._spent += len(sets) * len(sequences) * self._length

    def _mean(self, removed: Removed) -> float:
        total, count = self._costs[removed]
        return total / count

    def _ranking(self) -> list[tuple[Removed, float]]:
        whole = [(each, self._mean(each)) for each, (_, count) in self._costs.items() if count == self._sequences]
        return sorted(whole, key=lambda pair: (pair[1], sorted(pair[0])))

    def _is_spent(self) -> bool:
        if self._seconds is not None:
            return time.perf_counter() - self._start >= self._seconds
        return self._spent >= (self._tokens or 16 * self._sequences * self._length)


def _parsed_budget(budget: int | str) -> tuple[int, float | None]:
    """Tokens, and seconds where the budget is a time."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kms]?)", str(budget))
    if match is None:
        raise UserError(f"budget of search must be tokens (16000, 16k) or a time (5m, 30s), not {budget!r}")
    number, unit = float(match[1]), match[2]
    if unit in ("m", "s"):
        return 0, number * (60 if unit == "m" else 1)
    return int(number * (1000 if unit == "k" else 1)), None


CRITERION = Search
