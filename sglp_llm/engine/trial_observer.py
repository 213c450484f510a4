"""What watches trials: the interface between the removal of layers and everything that is measured on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from sglp_llm.engine.observer import Batch
from sglp_llm.engine.replay import Replay
from sglp_llm.processes import Processes


class TrialObserver(ABC):
    """Watches the trials of one round.

    Attributes:
        needs_dense: Whether it looks at what the whole model computes.
        together: How many consecutive calibration sequences (a multiple of it after the first) one process must see.
    """

    needs_dense: ClassVar[bool] = False
    together: int = 1

    def on_batch(  # noqa: B027 - not every measure looks at it
        self, batch: Batch, replay: Replay, current: torch.Tensor, dense: torch.Tensor
    ) -> None:
        """Before the trials of a batch.

        Args:
            batch: The sequences.
            replay: For ids and logits.
            current: ``[batch, tokens, hidden]``: what leaves the last layer of the model as it is in this round.
            dense: The same for the whole model where ``needs_dense`` asks for it, otherwise ``current``.
        """

    @abstractmethod
    def on_trial(self, layer: int, batch: Batch, replay: Replay, final: torch.Tensor) -> None:
        """One trial: ``final`` ``[batch, tokens, hidden]`` leaves the last layer when ``layer`` is removed as well."""

    @abstractmethod
    def on_end(self, candidates: Sequence[int], processes: Processes) -> None:
        """The round is over; called once, in every process: sums of what each has seen become sums over all sequences.

        Args:
            candidates: The layers that were tried, ascending, the same in every process. A process may have tried none.
            processes: For the sums.
        """
