"""A file -> its text, or its lines as JSON objects. Every problem with it is a `UserError` of one line."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from sglp_llm.errors import UserError
from sglp_llm.small_files import checked_data, open_regular

BYTE_ORDER_MARK = "\ufeff"

MOST_TEXT_BYTES = 2**28
"""The longest file of plain text that is read as a whole, decompressed."""

ENOUGH_TEXT_BYTES = 2**24
"""How far such a file is read where a number of sequences says how much is needed."""

MOST_LINE_BYTES = 2**24
"""The longest line of JSON, and the most that may be blank between two."""


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed where the name ends in ``.gz``; an error while the block reads them becomes a `UserError`.

    Raises:
        UserError: There is no such file, it cannot be read, or it is damaged.
    """
    try:
        with open_regular(path) as plain:
            if path.suffix == ".gz":
                with gzip.open(plain) as stream:
                    yield cast(IO[bytes], stream)
            else:
                yield plain
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged, or not a gzip file ({error})") from None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the file ({error.strerror or error})") from None


def check_not_empty(path: Path) -> None:
    """Looks at the first byte alone.

    Raises:
        UserError: There is none, or the file cannot be read.
    """
    with opened(path) as stream:
        if not stream.read(1):
            raise UserError(f"{path}: the file is empty")


def whole_text(path: Path, enough: int | None = None) -> str:
    """The file's text with Unix line endings, so that the same text gives the same sequences whatever system wrote it.

    Args:
        path: The file.
        enough: Bytes, decompressed, after which it is read no further.

    Raises:
        UserError: It cannot be read, is not UTF-8, is blank, or has more than `MOST_TEXT_BYTES`.
    """
    most = MOST_TEXT_BYTES if enough is None else enough
    with opened(path) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        if enough is None:
            raise UserError(
                f"{path}: more than {most >> 20} MiB of text, and all of it is to be read: give less of it, or jsonl:FILE:FIELD"
            )
        # After a whole line, or at least a whole character.
        end = data.rfind(b"\n", 0, most) + 1
        data = data[:end] if end else data[:most].decode(errors="ignore").encode()
    try:
        text = data.decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text.replace("\r\n", "\n")


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a JSONL file, read lazily, each with its place (``FILE, line 3``).

    Raises:
        UserError: While iterating: the file cannot be read, or a line is not a JSON object.
    """
    with opened(path) as stream:
        blank = 0
        for number in itertools.count(1):
            line = stream.readline(MOST_LINE_BYTES + 1)
            blank = 0 if line.strip() else blank + len(line)
            if len(line) > MOST_LINE_BYTES or blank > MOST_LINE_BYTES:
                what = "the line is longer" if len(line) > MOST_LINE_BYTES else "there is nothing in more"
                raise UserError(f"{path}, line {number}: {what} than {MOST_LINE_BYTES >> 20} MiB")
            if not line:
                return
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _object(line, where)


def text_field(row: Mapping[str, Any], field: str, where: str) -> str:
    """The text under a key of an object.

    Raises:
        UserError: There is no such key, or no text under it.
    """
    if field not in row:
        raise UserError(f"{where}: there is no field {field!r}; the fields are {', '.join(map(repr, row)) or 'none'}")
    value = row[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: field {field!r} holds half of a surrogate pair, which is not text") from None
    return value


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode().removeprefix(BYTE_ORDER_MARK).rstrip())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text: byte 0x{line[error.start]:02x} at position {error.start}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise UserError(f"{where}: not JSON ({error})") from None
    try:
        checked_data(row, texts=False)  # `text_field` names the field that is none
    except ValueError as error:
        raise UserError(f"{where}: not JSON that can be used ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, not {type(row).__name__}")
    return row
