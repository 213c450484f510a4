"""The processes that a launcher started, on any number of hosts; a failure of one ends all of them."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from sglp_llm.errors import UserError
from sglp_llm.processes.base import ALONE, Processes
from sglp_llm.processes.launch import process_count

PATIENCE = timedelta(days=7)
"""Timeout of a collective call. The slowest process may be hours behind; a failed one reports its failure at once."""


class Distributed(Processes):
    """One of several processes, in process groups of their own: gloo for tensors on the CPU, NCCL for those on a GPU.

    Every collective call first exchanges failures, so that no process waits for one that has failed.
    """

    def __init__(self) -> None:
        if torch.cuda.is_available():
            local_device()  # before anything waits for the others
        self._is_ours = not distributed.is_initialized()
        if self._is_ours:
            distributed.init_process_group("gloo")
        self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        self._groups = {"cpu": self._group}
        if torch.cuda.is_available():
            torch.cuda.set_device(local_device())
            self._groups["cuda"] = distributed.new_group(backend="nccl")
        self.index, self.count = distributed.get_rank(), distributed.get_world_size()
        self._has_failed = False
        atexit.register(self._leave)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        # The copy may run out of memory in one process alone, so it is made before the others wait for this one.
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._agree(None)
        distributed.all_reduce(total, group=self._groups[total.device.type])
        return total

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        try:
            yield
        except _Ended:
            raise
        except BaseException as error:
            self._agree(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
            raise
        self._agree(None)

    def _agree(self, failure: str | None) -> None:
        """Sends this process's failure, if any, to all processes; otherwise raises that of another one."""
        failures: list[str | None] = [None] * self.count
        try:
            distributed.all_gather_object(failures, failure, group=self._group)
        except RuntimeError as error:  # a connection to a process that was killed
            if failure is None:
                raise _Ended("another process is gone without a word: was it killed, or out of memory?") from error
            return
        failed = [index for index, message in enumerate(failures) if message is not None]
        self._has_failed |= bool(failed)
        if failed and failure is None:
            raise _Ended(f"process {failed[0]}: {failures[failed[0]]}")

    def _leave(self) -> None:
        # The launcher kills the others as soon as one exits with an error: wait until the main process has printed it.
        if self._has_failed:
            self._agree("over")
        if self._is_ours:
            distributed.destroy_process_group()


def local_device() -> int:
    """Index of this process's GPU: its rank on this host.

    Raises:
        UserError: There are fewer GPUs than processes on this host.
    """
    rank, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    started = int(os.environ.get("LOCAL_WORLD_SIZE", rank + 1))
    if started > there:
        raise UserError(
            f"{started} processes on this host and {there} GPU{'s' * (there != 1)}: start at most one for each "
            f"(torchrun --nproc-per-node {there})"
        )
    return rank


class _Ended(UserError):
    """Another process has failed, and all processes have been informed."""


_current: list[Distributed] = []


def current_processes() -> Processes:
    """The processes that torchrun or accelerate launch started, or `ALONE`; the first call waits for all of them.

    Each process computes on the GPU of its local rank, where there are GPUs, and on the CPU otherwise.
    """
    if process_count() < 2:
        return ALONE
    if not _current:
        _current.append(Distributed())
    return _current[0]
