"""What the processes of one run share: which sequences are whose, and sums over all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sglp_llm.errors import UserError

if TYPE_CHECKING:
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
        # Rounded up, so that among too many processes the main one, whose progress is seen, has work.
        first, last = (-(-groups * index // self.count) * together for index in (self.index, self.index + 1))
        return range(first, min(last, sequences))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every process's tensor, the same shape and dtype in each; a collective call.

        Raises:
            UserError: Another process failed; see `failing_together`.
        """
        return tensor

    def check_same(self, what: str, value: str) -> None:
        """Makes sure that all processes speak of the same thing, which may lie on another disk in each; a collective call.

        Args:
            what: What the value stands for.
            value: Anything that is only equal where the things are.

        Raises:
            UserError: A process has another value than the main one, or failed.
        """
        import torch

        digests = torch.zeros(self.count, 32, dtype=torch.float64)
        digests[self.index] = torch.tensor(list(hashlib.sha256(value.encode()).digest()))
        digests = self.sum(digests)
        for index in range(self.count):
            if not torch.equal(digests[index], digests[0]):
                raise UserError(f"process {index} has another {what} than process 0: give all hosts the same files")

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
