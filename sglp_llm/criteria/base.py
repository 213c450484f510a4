"""What a criterion is: an observer of the engine's pass that ends with one score a decoder layer, or with a set of layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sglp_llm.engine import Need, Observer
from sglp_llm.trials import Removed, Trials


class Criterion(Observer, ABC):
    """Judges the decoder layers. It says what it needs, watches one pass, and is asked for its verdict afterwards.

    Args:
        num_layers: Number of decoder layers L.
        seed: Of anything that is drawn.

    Attributes:
        needs_with_trials: What it watches in a pass of its own over the sequences of the trials.
        keeps_trials: Whether it goes on from the outcomes that a journal has kept (`Trials.once`).
    """

    needs_with_trials: ClassVar[Need] = Need.NOTHING
    keeps_trials: ClassVar[bool] = False

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        self.num_layers = num_layers
        self.seed = seed

    def on_trials(self, trials: Trials) -> None:
        """After the pass: lets the criterion remove layers tentatively (`Need.TRIALS`)."""

    def price(self, sequences: int, length: int) -> str:
        """What its trials will cost, in words; empty where it does not say.

        Args:
            sequences: How many there are for trials.
            length: Tokens in each.
        """
        return ""

    def report(self) -> Mapping[str, Any]:
        """After the verdict: how it came about, as plain data for the plan; empty where there is nothing to tell."""
        return {}


class ScoreCriterion(Criterion):
    """Gives one number a layer, so that layers can be compared inside segments."""

    @abstractmethod
    def scores(self) -> list[float]:
        """One number a layer, length L; larger = keep."""


class SetCriterion(Criterion):
    """Judges sets of layers: what it removes depends on how many go."""

    @abstractmethod
    def choose(self, n: int, removable: Sequence[int]) -> list[int]:
        """The layers that go, in the order in which the criterion removes them.

        Args:
            n: How many; at most ``len(removable)``.
            removable: Layers that may go, ascending and without gaps.
        """

    def runners_up(self, n: int, removable: Sequence[int]) -> list[Removed]:
        """Other good sets, the best first, behind what `choose` gives; most criteria know none."""
        return []


class GreedyCriterion(SetCriterion):
    """Removes the layer that costs least, scores what is left again, and repeats."""

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        super().__init__(num_layers, seed)
        self._order: list[int] = []
        self._among: Sequence[int] = ()

    def on_trials(self, trials: Trials) -> None:
        self._trials = trials

    @abstractmethod
    def costs_of(self, removed: Removed, sets: Sequence[Removed]) -> dict[Removed, float]:
        """What each of these sets costs, every one of them the removed layers and one more; the least wins."""

    def costs(self, removed: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        """What each candidate's removal would cost on top of those that are removed already."""
        gone = frozenset(removed)
        costs = self.costs_of(gone, [gone | {layer} for layer in candidates])
        return {layer: costs[gone | {layer}] for layer in candidates}

    def continue_from(self, order: Sequence[int], removable: Sequence[int]) -> None:
        """Takes over what an earlier run with the same sequences has removed already, in its order."""
        self._order, self._among = list(order), removable

    def choose(self, n: int, removable: Sequence[int]) -> list[int]:
        if list(removable) != list(self._among):
            self._order, self._among = [], removable
        while len(self._order) < n:
            candidates = [layer for layer in removable if layer not in self._order]
            costs = self.costs(self._order, candidates)
            self._order.append(min(candidates, key=lambda layer: (costs[layer], layer)))
        return self._order[:n]
