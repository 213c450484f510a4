"""Storage for hidden states between decoder layers: on the device while there is room, in host memory, or on disk."""

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
from sglp_llm.models.devices import free_on
from sglp_llm.models.loading import DecoderModel

DEVICE_SHARE = 0.25
"""Share of a device's free memory that stored hidden states may take; the rest is for computing."""


class StateStore:
    """Stores tensors by slot (a decoder layer, a stream, a set of removed layers) and batch.

    They stay on the device while there is room, and go to host memory after that. There they are in pinned memory, and are
    copied by a stream of their own, so that nobody waits for a copy.

    Args:
        device: The device that `get` returns them on.
        most: Bytes that may stay there; ``None`` = `DEVICE_SHARE` of what is free.
    """

    def __init__(self, device: torch.device, most: int | None = None) -> None:
        self._device = device
        self._kept: dict[Hashable, dict[int, torch.Tensor]] = defaultdict(dict)
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        room = int(DEVICE_SHARE * (free_on(device) or 0))
        self._room = room if most is None else min(room, most)
        self._used: dict[int, int] = {}  # how often each tensor on the device is stored, by its id

    def put(self, slot: Hashable, batch: Batch, states: torch.Tensor) -> None:
        """Stores a tensor, replacing an earlier one. It must not be modified in-place afterwards."""
        self._forget_tensor(self._kept[slot].pop(batch.first, None))
        self._kept[slot][batch.first] = self._placed(states.detach())

    def get(self, slot: Hashable, batch: Batch) -> torch.Tensor:
        """The stored tensor, on the device."""
        kept = self._kept[slot][batch.first]
        if self._copying is None or kept.is_cuda:
            return kept.to(self._device)
        with torch.cuda.stream(self._copying):
            states = kept.to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copying)
        states.record_stream(computing)
        return states

    def share(self, slot: Hashable, other: Hashable) -> None:
        """Makes ``other`` a copy of ``slot`` without copying tensors: a later `put` into one does not affect the other."""
        self._kept[other] = dict(self._kept[slot])
        for kept in self._kept[other].values():
            if id(kept) in self._used:
                self._used[id(kept)] += 1

    def drop(self, slot: Hashable) -> None:
        """Deletes a slot."""
        for kept in self._kept.pop(slot, {}).values():
            self._forget_tensor(kept)

    def _placed(self, states: torch.Tensor) -> torch.Tensor:
        if self._copying is None:
            return states.cpu()
        size = states.numel() * states.element_size()
        if size <= self._room:
            self._room -= size
            states = states.to(self._device)
            self._used[id(states)] = self._used.get(id(states), 0) + 1
            return states
        host = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
        self._copying.wait_stream(torch.cuda.current_stream(states.device))
        with torch.cuda.stream(self._copying):
            host.copy_(states, non_blocking=True)
        states.record_stream(self._copying)
        return host

    def _forget_tensor(self, kept: torch.Tensor | None) -> None:
        if kept is None or id(kept) not in self._used:
            return
        self._used[id(kept)] -= 1
        if not self._used[id(kept)]:
            del self._used[id(kept)]
            self._room += kept.numel() * kept.element_size()


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
def state_store(model: DecoderModel) -> Iterator[StateStore]:
    """A store for a model's hidden states, in its scratch folder where it has one; files are deleted at the end of the block.

    Raises:
        UserError: No folder can be created there.
    """
    device, scratch = model.input_device, None if model.weights is None else model.weights.scratch
    if scratch is None:
        yield StateStore(device, model.state_bytes)
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix="sglp-llm-", dir=scratch))
    except OSError as error:
        raise UserError(f"{scratch}: not a folder for scratch files ({error.strerror})") from None
    try:
        yield DiskStore(device, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
