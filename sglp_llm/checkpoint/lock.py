"""One run at a time: a lock file with the process id of the run that works on an output or a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sglp_llm.errors import UserError, disk_of

LOCK_FILE_NAME = ".lock"
"""The lock of a folder that a run works in, inside it."""

_held: set[Path] = set()


def lock_beside(output: Path) -> Path:
    """The lock of an output that does not exist before it is complete: a hidden file beside it."""
    return output.with_name(f".{output.name}{LOCK_FILE_NAME}")


@contextmanager
def only_run(lock: Path, what: Path) -> Iterator[None]:
    """Until the block ends, no other process can begin a run on the same thing.

    The kernel releases the lock when the process dies, however it dies: the file that a killed run leaves stops nobody, and
    is removed by the next run. The process id in it is for the message. A process may enter again what it holds. On a file
    system without locks nothing is refused.

    Args:
        lock: The lock file; missing parents are made, and removed again if they are left empty.
        what: What is worked on, for the message.

    Raises:
        UserError: Another process works on it, or the lock file cannot be made.
    """
    path = Path(os.path.realpath(lock.parent)) / lock.name
    if path in _held:
        yield
        return
    made: list[Path] = []
    try:
        descriptor = _locked(path, what, made)
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
            surely(lambda: path.unlink(missing_ok=True))
            os.close(descriptor)
    finally:
        surely(lambda: remove_if_empty(made))


def surely(clean_up: Callable[[], None]) -> None:
    """Cleans up to the end where a signal interrupts that; the interruption goes on afterwards."""
    try:
        with suppress(OSError):
            clean_up()
    except BaseException:
        with suppress(OSError):
            clean_up()
        raise


def _locked(path: Path, what: Path, made: list[Path]) -> int:
    """An open lock file that is locked, and still at its path."""
    while True:
        try:
            with disk_of(what):
                make_parents(path.parent, made)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(f"{what}: cannot make the lock file {path} ({error.strerror})") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise UserError(
                f"{what}: another run is working on it (process {owner or 'unknown'}, {path}): "
                "wait until it has ended, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        if is_at(path, descriptor):
            break
        os.close(descriptor)
    with suppress(OSError):  # a full disk is found by what has to be written
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def make_parents(parent: Path, made: list[Path]) -> None:
    """Makes the missing folders down to ``parent`` and puts them into ``made``, deepest first."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    for folder in reversed(missing):
        with suppress(FileExistsError):
            folder.mkdir()
            made.insert(0, folder)


def remove_if_empty(folders: list[Path]) -> None:
    """Removes folders, deepest first; those that hold something stay."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def is_at(path: Path, descriptor: int) -> bool:
    """Whether the path still leads to the open file or folder: it may have been removed before the lock was acquired."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
