"""Checks the header of a GGUF file before the package `gguf` reads it, which believes what the file says about itself.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO, NoReturn

from sglp_llm.errors import UserError
from sglp_llm.plan.plan_fields import MOST_LAYERS
from sglp_llm.small_files import open_regular

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MOST_NAME_BYTES = 2**16
_MOST_FIELDS = 2**16
_MOST_TENSORS = 2**20
_MOST_DIMENSIONS = 4


def check_gguf(file: Path) -> None:
    """Checks that every count in the header fits the bytes that are there, and that the depth is that of a model.

    Raises:
        UserError: It is no GGUF file of version 2 or 3, or it is damaged.
    """
    try:
        with open_regular(file) as stream:
            _Header(file, stream).check()
    except (FileNotFoundError, OSError) as error:
        raise UserError(f"{file}: cannot read it ({error.strerror})") from None


class _Header:
    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self._file, self._stream, self._order = file, stream, "<"
        self._size = os.fstat(stream.fileno()).st_size

    def check(self) -> None:
        if self._stream.read(4) != b"GGUF":
            self._refuse("it does not begin with GGUF")
        version = self._number(4)
        if version & 0xFFFF == 0:  # as the package does
            self._order, version = ">", version >> 24
        if version not in (2, 3):
            self._refuse(f"version {version} is neither 2 nor 3")
        tensors, fields = self._number(8), self._number(8)
        if tensors > _MOST_TENSORS or fields > _MOST_FIELDS:
            self._refuse(f"it is said to have {tensors} tensors and {fields} fields")
        for _ in range(fields):
            name = self._bytes(_MOST_NAME_BYTES)
            kind = self._number(4)
            if name.endswith((b".block_count", b".expert_count")) and kind in _SIZES:
                count = self._number(_SIZES[kind])
                if count > MOST_LAYERS:
                    self._refuse(
                        f"{name.decode(errors='replace')} is {count}, and no model has more than {MOST_LAYERS}"
                    )
            else:
                self._skip(kind)
        for _ in range(tensors):
            self._bytes(_MOST_NAME_BYTES)
            dimensions = self._number(4)
            if dimensions > _MOST_DIMENSIONS:
                self._refuse(f"a tensor is said to have {dimensions} dimensions")
            for _ in range(dimensions):
                self._number(8)
            self._number(4)
            self._number(8)

    def _skip(self, kind: int) -> None:
        if kind == _STRING:
            self._bytes(self._size)
        elif kind == _ARRAY:
            element, count = self._number(4), self._number(8)
            if element == _STRING:
                self._need(8 * count)
                for _ in range(count):
                    self._bytes(self._size)
            elif element in _SIZES:
                self._need(_SIZES[element] * count)
                self._stream.seek(_SIZES[element] * count, os.SEEK_CUR)
            else:
                self._refuse(f"an array of elements of type {element}")
        elif kind in _SIZES:
            self._number(_SIZES[kind])
        else:
            self._refuse(f"a field of type {kind}")

    def _bytes(self, most: int) -> bytes:
        """A string: its name is needed where it is short; longer ones are passed over."""
        length = self._number(8)
        self._need(length)
        if length > most:
            self._refuse(f"a name of {length} bytes")
        if length > _MOST_NAME_BYTES:
            self._stream.seek(length, os.SEEK_CUR)
            return b""
        return self._stream.read(length)

    def _number(self, size: int) -> int:
        self._need(size)
        return int(struct.unpack(f"{self._order}{'_BH_I___Q'[size]}", self._stream.read(size))[0])

    def _need(self, count: int) -> None:
        if self._stream.tell() + count > self._size:
            self._refuse(f"it ends after {self._size} bytes, within its header")

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self._file}: not a whole GGUF file ({what})")
