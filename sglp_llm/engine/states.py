"""Storage for hidden states between decoder layers: in host memory, or on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sglp_llm.engine.observer import Batch
from sglp_llm.errors import UserError


class StateStore:
    """Stores tensors by slot (a decoder layer, a stream, a set of removed layers) and batch, in host memory.

    Args:
        device: The device that `get` returns them on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[Hashable, dict[int, torch.Tensor]] = defaultdict(dict)

    def put(self, slot: Hashable, batch: Batch, states: torch.Tensor) -> None:
        """Stores a tensor, replacing an earlier one. It must not be modified in-place afterwards."""
        self._kept[slot][batch.first] = states.detach().cpu()

    def get(self, slot: Hashable, batch: Batch) -> torch.Tensor:
        """The stored tensor, on the device."""
        return self._kept[slot][batch.first].to(self._device, non_blocking=True)

    def share(self, slot: Hashable, other: Hashable) -> None:
        """Makes ``other`` a copy of ``slot`` without copying tensors: a later `put` into one does not affect the other."""
        self._kept[other] = dict(self._kept[slot])

    def drop(self, slot: Hashable) -> None:
        """Deletes a slot."""
        self._kept.pop(slot, None)


class DiskStore(StateStore):
    """The same on disk, one file per tensor: host memory does not grow with the calibration set.

    Args:
        device: The device that `get` returns them on.
        folder: An existing empty folder.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        super().__init__(device)
        self._folder = folder
        self._count = 0
        self._files: dict[Hashable, dict[int, tuple[Path, torch.Size, torch.dtype]]] = defaultdict(dict)

    def put(self, slot: Hashable, batch: Batch, states: torch.Tensor) -> None:
        old = self._files[slot].get(batch.first)
        self._count += 1
        file = self._folder / str(self._count)
        host = states.detach().cpu().contiguous()
        try:
            file.write_bytes(_bytes_of(host))
        except OSError as error:
            raise UserError(f"{self._folder.parent}: cannot keep hidden states there ({error.strerror})") from None
        self._files[slot][batch.first] = file, host.shape, host.dtype
        self._forget(old)

    def get(self, slot: Hashable, batch: Batch) -> torch.Tensor:
        file, shape, dtype = self._files[slot][batch.first]
        host = torch.empty(shape, dtype=dtype)
        with file.open("rb", buffering=0) as stream:
            view = _bytes_of(host)
            while view:
                view = view[stream.readinto(view) :]
        return host.to(self._device)

    def share(self, slot: Hashable, other: Hashable) -> None:
        for first, (file, shape, dtype) in self._files[slot].items():
            self._count += 1
            link = self._folder / str(self._count)
            os.link(file, link)
            self._files[other][first] = link, shape, dtype

    def drop(self, slot: Hashable) -> None:
        for kept in self._files.pop(slot, {}).values():
            self._forget(kept)

    @staticmethod
    def _forget(kept: tuple[Path, torch.Size, torch.dtype] | None) -> None:
        if kept is not None:
            kept[0].unlink()


def _bytes_of(host: torch.Tensor) -> memoryview:
    return memoryview(host.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@contextmanager
def state_store(device: torch.device, scratch: Path | None) -> Iterator[StateStore]:
    """A store whose files are deleted at the end of the block.

    Args:
        device: The device that `StateStore.get` returns tensors on.
        scratch: A folder for a `DiskStore`; ``None`` means host memory.

    Raises:
        UserError: No folder can be created there.
    """
    if scratch is None:
        yield StateStore(device)
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix="sglp-llm-", dir=scratch))
    except OSError as error:
        raise UserError(f"{scratch}: not a folder for scratch files ({error.strerror})") from None
    try:
        yield DiskStore(device, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
