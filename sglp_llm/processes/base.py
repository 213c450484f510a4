"""The processes of one run: how they divide the calibration sequences, and sums over all processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sglp_llm.errors import UserError

if TYPE_CHECKING:
    import torch


class Processes:
    """A single process: the base class of several ones, and the default of every function.

    Attributes:
        index: The rank of this process.
        count: The number of processes.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.index == 0

    def share(self, sequences: int, together: int = 1) -> range:
        """The calibration sequences of this process: contiguous, and in whole minibatches.

        Args:
            sequences: How many there are.
            together: How many consecutive ones belong together (a CKA minibatch). The last group may be smaller.

        Returns:
            Sequence numbers; empty where there are fewer groups than processes.
        """
        groups = -(-sequences // together)
        # Rounded up, so that with more processes than groups the main one, whose progress is displayed, has work.
        first, last = (-(-groups * index // self.count) * together for index in (self.index, self.index + 1))
        return range(first, min(last, sequences))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every process's tensor, the same shape and dtype in each; a collective call.

        Raises:
            UserError: Another process failed; see `failing_together`.
        """
        return tensor

    def check_same(self, what: str, value: str) -> None:
        """Checks that an input, which each process may read from another disk, is the same in all; a collective call.

        Args:
            what: Name of the input, for the message.
            value: A text that identifies it, such as a hash.

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

    def agreed(self, number: int) -> int:
        """The main process's number, in all processes; a collective call.

        Raises:
            UserError: Another process failed.
        """
        import torch

        return int(self.sum(torch.tensor(float(number if self.is_main else 0), dtype=torch.float64)))

    def wait(self) -> None:
        """Returns when all processes have called it; a collective call.

        Raises:
            UserError: Another process failed.
        """
        import torch

        self.sum(torch.zeros(1))

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """All processes complete the block, or all raise; a collective call at its end. Must not be nested.

        A process that fails raises its own error; the others raise that of the failed process of the lowest rank.

        Raises:
            UserError: Another process failed, with any error; the message is that error's: ``process 2: ...``.
        """
        yield


ALONE = Processes()
"""No other processes."""
