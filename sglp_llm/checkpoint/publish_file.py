"""A file that appears under its name complete, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sglp_llm.checkpoint.lock import surely
from sglp_llm.errors import UserError, disk_of


@contextmanager
def atomic_file(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields the path of a file to write, which takes the place of ``output`` when the block ends without an exception.

    It lies beside ``output`` under a hidden name, and is removed after an exception. What a killed process leaves there is
    replaced the next time.

    Raises:
        UserError: See `check_file`; at the beginning, or by the time the block ends.
    """
    check_file(output, overwrite)
    partial = output.with_name(f".{output.name}.partial")
    try:
        with disk_of(output):
            yield partial
            check_file(output, overwrite)
            partial.replace(output)
    finally:
        surely(lambda: partial.unlink(missing_ok=True))


def check_file(output: Path, overwrite: bool = False) -> None:
    """Refuses, before any work is done, a file that `atomic_file` could not make.

    Raises:
        UserError: It is a folder, or there is none to put it in, or it exists and may not be replaced.
    """
    if output.is_dir():
        raise UserError(f"{output}: is a folder; the output is a file")
    if not output.parent.is_dir():
        raise UserError(f"{output}: there is no folder {output.parent}")
    if output.exists() and not overwrite:
        raise UserError(f"{output}: already exists; choose another file, or replace it with --overwrite")
