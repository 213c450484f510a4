"""What the processes of one run share: which sequences are whose, and sums over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Processes:
    """One process that does everything: the base of the real thing, and what every function takes by default.

    Attributes:
        index: This process's number.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.index == 0

    def share(self, sequences: int, together: int = 1) -> range:
        """The calibration sequences of this process: contiguous, and without a minibatch cut in two.

        Args:
            sequences: How many there are.
            together: How many consecutive ones belong together (a CKA minibatch). The last group may be smaller.

        Returns:
            Sequence numbers; empty where there are fewer groups than processes.
        """
        groups = -(-sequences // together)
        first, last = (groups * index // self.count * together for index in (self.index, self.index + 1))
        return range(first, min(last, sequences))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every process's tensor, the same shape and dtype in each; a collective call.

        Raises:
            UserError: Another process failed; see `failing_together`.
        """
        return tensor

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """All processes get to the end of the block, or none does; a collective call, at its end. Not to be nested.

        Whoever raises inside raises its own error, and all others that of the first who did.

        Raises:
            UserError: Another process failed, with whatever error; the message is its own: ``process 2: ...``.
        """
        yield


ALONE = Processes()
"""No other processes."""
