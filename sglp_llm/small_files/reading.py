"""One file -> its bytes, text or JSON: a regular file, of a bounded size, in UTF-8, or one line that says what it is not."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from sglp_llm.errors import UserError
from sglp_llm.small_files.plain_data import decoded_json

MOST_BYTES = 16 * 2**20
"""The largest small file: a plan of 500 layers with its similarity matrix has 5 MB."""

MOST_JSON_BYTES = 2**28
"""The largest JSON file that a library is left to read: tokenizers have some 30 MB."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(file: Path, what: str = "file") -> BinaryIO:
    """Opens a regular file, through links too, and never waits: a pipe is refused.

    Args:
        file: The file.
        what: What it should be, for the message.

    Raises:
        FileNotFoundError: There is none.
        UserError: It is something else, or cannot be opened.
    """
    try:
        _check_regular(file, Path(file).stat(), what)  # before it is opened: to open a device may do something
        # Without waiting for a pipe's other end, should one have taken the file's place meanwhile.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, UserError):
        raise
    except OSError as error:
        raise UserError(f"{file}: cannot read the {what} ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{str(file)!r}: cannot be the name of a file") from None
    try:
        _check_regular(file, os.fstat(descriptor), what)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(file: Path, what: str = "file", most: int = MOST_BYTES) -> bytes:
    """The bytes of a small file.

    Args:
        file: The file.
        what: What it should be, for the message.
        most: The largest number of bytes.

    Raises:
        UserError: There is no such file, it is no regular file, cannot be read, or is larger.
    """
    try:
        with open_regular(file, what) as stream:
            # Not by the size that the file is said to have: those of the kernel say 0.
            data = stream.read(most + 1)
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such {what}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot read the {what} ({error.strerror})") from None
    if len(data) > most:
        raise UserError(f"{file}: too large for a {what}: it has more than {most} bytes")
    return data


def read_text(file: Path, what: str = "file", most: int = MOST_BYTES) -> str:
    """The text of a small file, without the byte order mark with which some editors begin one.

    Raises:
        UserError: See `read_bytes`; or it is not UTF-8.
    """
    data = read_bytes(file, what, most)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: cannot read the {what}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None


def read_json(file: Path, what: str = "file", most: int = MOST_BYTES) -> Any:
    """The plain data of a small JSON file.

    Raises:
        UserError: See `read_bytes`; or it is not JSON in UTF-8, or `checked_data` refuses it.
    """
    data = read_bytes(file, what, most)
    try:
        return decoded_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{file}: not a JSON file ({error})") from None


def read_json_lines(file: Path, what: str = "file", most: int = MOST_BYTES) -> list[dict[str, Any]]:
    """The objects of a small file with one of JSON a line.

    Raises:
        UserError: See `read_text`; or a line is no JSON object.
    """
    rows = []
    for number, line in enumerate(read_text(file, what, most).splitlines(), start=1):
        try:
            row = decoded_json(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}: expected a JSON object, not {type(row).__name__}")
        rows.append(row)
    return rows


def check_regular_files(folder: Path, pattern: str = "*") -> None:
    """Refuses a folder with pipes, devices or sockets in it, before a library opens one and waits for ever, or reads for ever.

    Raises:
        UserError: There is one, or the folder cannot be read.
    """
    try:
        for file in folder.glob(pattern):
            if not file.is_file() and not file.is_dir() and file.exists():
                _check_regular(file, file.stat(), "file: remove it")
            elif file.suffix == ".json" and file.stat().st_size > MOST_JSON_BYTES:
                raise UserError(
                    f"{file}: too large for a JSON file of a checkpoint: it has more than {MOST_JSON_BYTES} bytes"
                )
    except OSError as error:
        raise UserError(f"{folder}: cannot read the folder ({error.strerror})") from None


def _check_regular(file: Path, found: os.stat_result, what: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise UserError(f"{file}: this is {kind}, not a {what}")
