"""The observer interface of trials: receives the output of the model without some layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch

from sglp_llm.engine import Batch
from sglp_llm.engine.replay import Replay
from sglp_llm.processes import Processes

Removed = frozenset[int]
"""Original indices of the layers that a trial removes."""


class TrialObserver(ABC):
    """Receives callbacks for the trials of one `Trials.run`.

    Attributes:
        reference: Removed layers of the model that trials are compared with, the empty set for the whole model; ``None`` if there
            is no reference.
        together: Group size of consecutive calibration sequences, counted from the first, that one process must see whole.
    """

    reference: Removed | None = None
    together: int = 1

    def on_reference(self, batch: Batch, replay: Replay, final: torch.Tensor) -> None:  # noqa: B027 - not all have one
        """Called before a batch's trials with the states ``[batch, tokens, hidden]`` leaving the reference's last layer."""

    @abstractmethod
    def on_trial(self, removed: Removed, batch: Batch, replay: Replay, final: torch.Tensor) -> None:
        """One trial: ``final`` are the states ``[batch, tokens, hidden]`` that leave the last layer without ``removed``."""

    @abstractmethod
    def on_end(self, sets: Sequence[Removed], processes: Processes) -> None:
        """Called once in every process after all trials: the place to sum over processes (a collective call).

        Args:
            sets: The sets that were tried, the same in every process. A process may have seen no sequence.
            processes: For the sums.
        """

    def with_reference(self, sets: Iterable[Removed]) -> list[Removed]:
        """The sets that must run: the reference first, if there is one."""
        if self.reference is None:
            return list(sets)
        return [self.reference, *(removed for removed in sets if removed != self.reference)]


def split_at(index: int, sets: Sequence[Removed]) -> tuple[list[Removed], list[Removed]]:
    """Splits the sets into those that keep the layer and those that remove it."""
    return [each for each in sets if index not in each], [each for each in sets if index in each]
