"""What watches trials: the interface between the removal of layers and everything that is measured on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch

from sglp_llm.engine import Batch
from sglp_llm.engine.replay import Replay
from sglp_llm.processes import Processes

Removed = frozenset[int]
"""Original indices of the layers that a trial does without."""


class TrialObserver(ABC):
    """Watches the trials of one round.

    Attributes:
        reference: The removed set that trials are compared with, the empty one for the whole model; ``None`` without one.
        together: How many consecutive calibration sequences (a multiple of it after the first) one process must see.
    """

    reference: Removed | None = None
    together: int = 1

    def on_reference(self, batch: Batch, replay: Replay, final: torch.Tensor) -> None:  # noqa: B027 - not all have one
        """Before the trials of a batch: ``final`` ``[batch, tokens, hidden]`` leaves the last layer of the reference."""

    @abstractmethod
    def on_trial(self, removed: Removed, batch: Batch, replay: Replay, final: torch.Tensor) -> None:
        """One trial: ``final`` ``[batch, tokens, hidden]`` leaves the last layer without the removed ones."""

    @abstractmethod
    def on_end(self, sets: Sequence[Removed], processes: Processes) -> None:
        """The round is over; called once, in every process: sums of what each has seen become sums over all sequences.

        Args:
            sets: Those that were tried, the same in every process. A process may have tried none.
            processes: For the sums.
        """

    def with_reference(self, sets: Iterable[Removed]) -> list[Removed]:
        """The sets that must run: the reference first, where there is one."""
        if self.reference is None:
            return list(sets)
        return [self.reference, *(removed for removed in sets if removed != self.reference)]


def split_at(index: int, sets: Sequence[Removed]) -> tuple[list[Removed], list[Removed]]:
    """The sets of which the layer stays, and those of which it goes."""
    return [each for each in sets if index not in each], [each for each in sets if index in each]
