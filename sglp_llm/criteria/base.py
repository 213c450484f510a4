"""Base classes of criteria: observers of the engine's pass that return one score per decoder layer, or a set of layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sglp_llm.engine import Need, Observer
from sglp_llm.method.staying import FREE, Staying
from sglp_llm.records import SimilarityMatrix
from sglp_llm.trials import Removed, Trials


class Criterion(Observer, ABC):
    """Decides which decoder layers to remove. It declares its needs, observes one pass, and then gives scores or a set.

    Args:
        num_layers: Number of decoder layers L.
        seed: Random seed.

    Attributes:
        needs_with_trials: What it observes in an additional pass of its own over the trial sequences.
        trial_cost: How many trials it makes, in words for the list of criteria; a trial runs the model without some layers.
        keeps_trials: Whether it can resume from trial results kept in a journal (`Trials.once`).
        cka: The CKA matrix, if it has computed one for itself.
    """

    needs_with_trials: ClassVar[Need] = Need.NOTHING
    trial_cost: ClassVar[str] = "a trial of every layer"
    keeps_trials: ClassVar[bool] = False
    cka: SimilarityMatrix | None = None

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        self.num_layers = num_layers
        self.seed = seed

    def on_trials(self, trials: Trials) -> None:
        """Called after the pass: the criterion may run the model without sets of layers (`Need.TRIALS`)."""

    def price(self, sequences: int, length: int) -> str:
        """The estimated cost of its trials, as text; empty if there is no estimate.

        Args:
            sequences: Number of trial sequences.
            length: Tokens per sequence.
        """
        return ""

    def report(self) -> Mapping[str, Any]:
        """Called after the decision: how it was reached, as plain data for the plan; may be empty."""
        return {}


class ScoreCriterion(Criterion):
    """Gives one score per layer, so that layers can be compared inside segments."""

    @abstractmethod
    def scores(self) -> list[float]:
        """One score per layer, length L; larger = keep."""


class SetCriterion(Criterion):
    """Chooses a set of layers; the sets for different numbers of layers need not be nested.

    Attributes:
        contiguous: Whether it removes layers in a row; others add one layer after the other.
        staying: Which layers must stay; whoever makes the criterion sets it, and `choose` respects it.
    """

    contiguous: ClassVar[bool] = False
    staying: Staying = FREE

    @abstractmethod
    def choose(self, n: int, removable: Sequence[int]) -> list[int]:
        """The layers to remove, in the order in which the criterion removes them.

        Args:
            n: Number of layers to remove; at most ``len(removable)``.
            removable: Layers that may be removed, ascending and without gaps.

        Raises:
            UserError: So many cannot go together.
        """

    def runners_up(self, n: int, removable: Sequence[int]) -> list[Removed]:
        """The next best sets after the one that `choose` returns, best first; empty for most criteria."""
        return []


class GreedyCriterion(SetCriterion):
    """Removes the layer with the lowest cost, scores the remaining layers again, and repeats."""

    trial_cost = "a trial of every layer left, for each layer removed"

    def __init__(self, num_layers: int, seed: int = 0) -> None:
        super().__init__(num_layers, seed)
        self._order: list[int] = []
        self._among: Sequence[int] = ()

    def on_trials(self, trials: Trials) -> None:
        self._trials = trials

    @abstractmethod
    def costs_of(self, removed: Removed, sets: Sequence[Removed]) -> dict[Removed, float]:
        """The cost of each set; every set is ``removed`` plus one more layer. The set with the lowest cost is taken."""

    def costs(self, removed: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        """The cost of removing each candidate in addition to the layers already removed."""
        gone = frozenset(removed)
        costs = self.costs_of(gone, [gone | {layer} for layer in candidates])
        return {layer: costs[gone | {layer}] for layer in candidates}

    def continue_from(self, order: Sequence[int], removable: Sequence[int]) -> None:
        """Continues from the layers that an earlier run with the same sequences has removed, in its order."""
        self._order, self._among = list(order), removable

    def choose(self, n: int, removable: Sequence[int]) -> list[int]:
        if list(removable) != list(self._among):
            self._order, self._among = [], removable
        while len(self._order) < n:
            candidates = self.staying.following(self._order, removable, f"drop {n}")
            costs = self.costs(self._order, candidates)
            self._order.append(min(candidates, key=lambda layer: (costs[layer], layer)))
        return self._order[:n]
