"""Tensors of existing safetensors files -> new files. The bytes are copied by the kernel and never become tensors.

A few tensors may come from memory instead, as bytes.

Only the standard library is used, for the reason given in `sglp_llm.tensor_files.reader`.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from sglp_llm.errors import UserError
from sglp_llm.progress import Advance
from sglp_llm.tensor_files.reader import DTYPE_BYTES, INDEX_FILE_NAME, SINGLE_FILE_NAME, TensorEntry


@dataclass(frozen=True)
class NewTensor:
    """A tensor in memory that is to be written: the counterpart of `TensorEntry`.

    Attributes:
        dtype: safetensors' name of the dtype.
        shape: Its shape; empty for a scalar.
        data: Its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.data.nbytes

    @property
    def num_elements(self) -> int:
        """The product of the shape."""
        return math.prod(self.shape)


NamedEntry = tuple[str, TensorEntry | NewTensor]
"""A tensor's name in the new file, and where its bytes are now."""

CHUNK_BYTES = 64 * 2**20
"""The most that is copied between two calls of `Advance`: a progress bar that stands still looks like a hang."""

BUFFER_BYTES = 2**20

UNSUPPORTED = frozenset({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ENOTSOCK})
"""What a copying method fails with when this kernel, file system or sandbox does not offer it."""


def group_by_size(tensors: Iterable[NamedEntry], max_shard_size: int) -> list[list[NamedEntry]]:
    """Splits tensors into shards greedily and in order, exactly as transformers' ``save_pretrained`` does.

    A tensor larger than a shard gets a shard of its own, and the current shard continues to be filled.

    Args:
        tensors: The tensors in the order in which they are to be written.
        max_shard_size: Largest number of bytes of tensors in one shard.

    Raises:
        UserError: ``max_shard_size`` is not positive.
    """
    if max_shard_size < 1:
        raise UserError(f"the largest shard size must be at least 1 byte, not {max_shard_size}")
    shards: list[list[NamedEntry]] = []
    current: list[NamedEntry] = []
    room = max_shard_size
    for name, entry in tensors:
        if entry.nbytes > max_shard_size:
            shards.append([(name, entry)])
            continue
        if entry.nbytes > room:
            shards.append(current)
            current, room = [], max_shard_size
        current.append((name, entry))
        room -= entry.nbytes
    return [*shards, current] if current else shards


def write_shards(
    folder: Path, shards: Sequence[Sequence[NamedEntry]], metadata: Mapping[str, str], advance: Advance
) -> None:
    """Writes the weights of a checkpoint: one file, or several and their index.

    Args:
        folder: An existing folder, usually that of `atomic_folder`.
        shards: The tensors of every file, as from `group_by_size`; empty shards get no file.
        metadata: ``__metadata__`` of every file; transformers expects ``{"format": "pt"}``.
        advance: Called with the number of bytes of tensors that were just copied.

    Raises:
        OSError: The disk is full, or a file cannot be read or written.
        UserError: A source file is shorter than its header says.
    """
    shards = [shard for shard in shards if shard]
    entries = [pair for shard in shards for pair in shard]
    assert entries, "a checkpoint without tensors"
    assert len({name for name, _ in entries}) == len(entries), "a tensor would stand in the checkpoint twice"
    if len(shards) == 1:
        write_safetensors(folder / SINGLE_FILE_NAME, shards[0], metadata, advance)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file_name, shard, metadata, advance)
        weight_map.update({name: file_name for name, _ in shard})
    index = {
        "metadata": {
            "total_parameters": sum(
                entry.num_elements for _, entry in entries
            ),  # as stored: packed weights count packed
            "total_size": sum(entry.nbytes for _, entry in entries),
        },
        "weight_map": weight_map,
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX_FILE_NAME).write_text(text, encoding="utf-8")


def write_safetensors(path: Path, tensors: Sequence[NamedEntry], metadata: Mapping[str, str], advance: Advance) -> None:
    """Writes one safetensors file with tensors copied from others, or from memory, bit for bit.

    Tensors of larger elements come first so that every tensor is aligned, as in files that safetensors writes itself;
    tensors of equal element size keep the given order.

    Args:
        path: The file to write; it must not exist yet.
        tensors: The tensors' new names and where their bytes are.
        metadata: ``__metadata__``; left out when empty.
        advance: Called with the number of bytes of tensors that were just written, `CHUNK_BYTES` at most.

    Raises:
        OSError: The disk is full, or a file cannot be read or written.
        UserError: A source file is shorter than its header says.
    """
    tensors = sorted(tensors, key=lambda pair: -DTYPE_BYTES[pair[1].dtype])
    # "x": an existing file might be the one that is copied from.
    with path.open("xb", buffering=0) as target:
        _write_all(target.fileno(), _header(tensors, metadata))
        copy = _Copier(target.fileno(), advance)
        for file, group in groupby((entry for _, entry in tensors), key=_file):
            entries = list(group)
            for new in (entry for entry in entries if isinstance(entry, NewTensor)):
                for start in range(0, new.nbytes, CHUNK_BYTES):
                    chunk = new.data[start : start + CHUNK_BYTES]
                    _write_all(target.fileno(), chunk)
                    advance(chunk.nbytes)
            if file is not None:
                with file.open("rb", buffering=0) as source:
                    for offset, nbytes in _runs(entry for entry in entries if isinstance(entry, TensorEntry)):
                        copy(source.fileno(), offset, nbytes, file)


def _file(entry: TensorEntry | NewTensor) -> Path | None:
    return entry.file if isinstance(entry, TensorEntry) else None


def _header(tensors: Sequence[NamedEntry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, entry in tensors:
        assert name not in header, f"tensor {name!r} would stand in the file twice"
        start, end = end, end + entry.nbytes
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _runs(entries: Iterable[TensorEntry]) -> list[tuple[int, int]]:
    """(offset, nbytes) of the entries of one file, adjacent ones joined: fewer and larger copies."""
    runs: list[tuple[int, int]] = []
    for entry in entries:
        if runs and sum(runs[-1]) == entry.offset:
            offset, nbytes = runs.pop()
            runs.append((offset, nbytes + entry.nbytes))
        else:
            runs.append((entry.offset, entry.nbytes))
    return runs


class _Copier:
    """Appends byte ranges of files to one file by the fastest method that works here; all of them move the target's position."""

    def __init__(self, target: int, advance: Advance) -> None:
        self._target = target
        self._advance = advance
        self._methods: list[Callable[[int, int, int, int], int]] = [_by_copy_file_range, _by_sendfile, _by_hand]

    def __call__(self, source: int, offset: int, nbytes: int, file: Path) -> None:
        end = offset + nbytes
        while offset < end:
            copied = self._step(source, offset, min(end - offset, CHUNK_BYTES))
            if copied == 0:
                raise UserError(f"{file}: ends {end - offset} bytes early; it changed while it was being copied")
            offset += copied
            self._advance(copied)

    def _step(self, source: int, offset: int, nbytes: int) -> int:
        """Copies as much as one call copies; 0 at the end of the source."""
        while len(self._methods) > 1:
            try:
                copied = self._methods[0](self._target, source, offset, nbytes)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                copied = 0
            # Some kernels return 0 instead of failing where they cannot copy, so only a plain read proves an end.
            if copied:
                return copied
            del self._methods[0]
        return self._methods[0](self._target, source, offset, nbytes)


def _by_copy_file_range(target: int, source: int, offset: int, nbytes: int) -> int:
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, "copy_file_range")
    return os.copy_file_range(source, target, nbytes, offset_src=offset)


def _by_sendfile(target: int, source: int, offset: int, nbytes: int) -> int:
    if not hasattr(os, "sendfile"):
        raise OSError(errno.ENOSYS, "sendfile")
    return os.sendfile(target, source, offset, nbytes)


def _by_hand(target: int, source: int, offset: int, nbytes: int) -> int:
    data = os.pread(source, min(nbytes, BUFFER_BYTES), offset)
    _write_all(target, data)
    return len(data)


def _write_all(target: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(target, rest) :]
