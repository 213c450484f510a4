"""A folder that appears under its name complete, or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sglp_llm.checkpoint.lock import is_at, make_parents, remove_if_empty, surely
from sglp_llm.errors import UserError, disk_of

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
AT_FDCWD = -100

# A folder that holds one of these was written by an export, or by an analysis.
_MARKERS = ("config.json", "sglp_plan.json")


@contextmanager
def atomic_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder next to ``output`` that takes its place when the block ends without an exception.

    After an exception, Ctrl-C included, the folder is removed and ``output`` is as it was. A process that is killed
    leaves at ``output`` what was there before or the complete new folder, and beside it a hidden folder that the next
    export to the same output removes. Only the death of the process is covered: nothing is flushed to the disk, so a
    power failure shortly after the end may still lose data. Where the kernel cannot swap two folders in one step (no
    Linux, some network file systems), a process killed between the two steps of replacing an old folder leaves it under
    a hidden name ``.NAME.replaced-*``, which is not removed before there is something at ``output``.

    Args:
        output: The folder to make. Missing parents are made too, and removed again should the block fail. A symbolic
            link is followed.
        overwrite: Whether ``output`` may be there already: empty, or with a model (``config.json``) in it. It is
            removed only after the new folder has taken its place.

    Raises:
        UserError: ``output`` may not be replaced, at the beginning or by the time the block ends; or no folder can be
            made there.
    """
    target = Path(os.path.realpath(output))
    check_output(target, overwrite)
    made: list[Path] = []
    try:
        try:
            with disk_of(output):
                make_parents(target.parent, made)
            _remove_leftovers(target)
        except OSError as error:
            raise _no_folder(output, target, error) from None
        with _locked_sibling(output, target) as partial, disk_of(output), _still_there(output, partial):
            yield partial
            _publish(partial, target, overwrite)
    except BaseException:
        surely(lambda: remove_if_empty(made))  # another process may have written to one meanwhile
        raise


def check_output(output: Path, overwrite: bool = False) -> None:
    """Refuses, before any work is done, an output that `atomic_folder` could not make.

    Raises:
        UserError: It is a file, it exists and may not be replaced, or what would be replaced is not one of ours.
    """
    target = Path(os.path.realpath(output))
    if not os.path.lexists(target):
        parent = next(folder for folder in target.parents if os.path.lexists(folder))
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"{output}: cannot make a folder in {parent}: it is {_obstacle(parent)}")
        return
    if not target.is_dir():
        raise UserError(f"{target}: is a file; the output is a folder")
    if _is_mount_point(target):
        raise UserError(f"{target}: is a mount point, which cannot be replaced; choose a folder inside it")
    if not overwrite:
        raise UserError(f"{target}: already exists; choose another folder, or replace it with --overwrite")
    # A slip such as "--output ~ --overwrite" must not cost a home folder.
    if any(target.iterdir()) and not any((target / marker).exists() for marker in _MARKERS):
        raise UserError(f"{target}: is neither a model nor an analysis; --overwrite replaces only these")


def remove_folder(folder: Path, output: Path) -> None:
    """Removes a folder that a run to ``output`` has worked in: under its own name it is whole, or gone.

    A run that is killed meanwhile leaves a hidden folder beside it, which the next run to the same output removes. Half a
    folder under its own name would be taken for an interrupted run, and could not be gone on with.

    Args:
        folder: Beside ``output``; where it is missing or cannot be moved, nothing happens.
        output: What the run has made.
    """
    doomed = _hidden(folder.with_name(output.name), "partial")
    try:
        with suppress(OSError):
            folder.rename(doomed)
    finally:
        surely(lambda: shutil.rmtree(doomed, ignore_errors=True))


def _hidden(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")


def _obstacle(parent: Path) -> str:
    return "not writable" if parent.is_dir() else "not a folder"


def _is_mount_point(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    try:  # a folder mounted from elsewhere on the same file system
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    special = {b"\\": rb"\134", b" ": rb"\040", b"\t": rb"\011", b"\n": rb"\012"}
    written = b"".join(special.get(bytes([byte]), bytes([byte])) for byte in os.fsencode(folder))
    return any(mount.split(b" ")[4] == written for mount in mounts)


def _no_folder(output: Path, target: Path, error: OSError) -> UserError:
    return UserError(f"{output}: cannot make a folder in {target.parent} ({error.strerror})")


@contextmanager
def _locked_sibling(output: Path, target: Path) -> Iterator[Path]:
    """Makes a folder with the permissions the umask gives, unlike ``mkdtemp``, and locks it until the block or the process ends.

    The lock is on the folder itself: it needs no lock file, which would have to be removed before publication, and it tells
    a running export from a leftover, since the kernel releases it when the process dies.
    """
    # The name is known before the folder is made, so that an interruption between any two steps removes it.
    partial = _hidden(target, "partial")
    lock = None
    try:
        while lock is None:
            lock = _made_and_locked(partial, output, target)
        yield partial
    finally:
        # It now holds a failed export, or the old folder that was swapped out, or does not exist.
        surely(lambda: shutil.rmtree(partial, ignore_errors=True))
        if lock is not None:
            os.close(lock)


def _made_and_locked(partial: Path, output: Path, target: Path) -> int | None:
    """The open folder; ``None`` if another export took it for a leftover before it could be locked."""
    try:
        with disk_of(output):
            partial.mkdir()
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and target.parent.is_dir():
            return None
        raise _no_folder(output, target, error) from None
    with suppress(OSError):  # a file system without locks: leftovers are not removed then
        fcntl.flock(lock, fcntl.LOCK_EX)
    if is_at(partial, lock):
        return lock
    os.close(lock)
    return None


@contextmanager
def _still_there(output: Path, partial: Path) -> Iterator[None]:
    """Says what has happened where the folder is gone that is being written to."""
    try:
        yield
    except Exception as error:
        if not partial.is_dir() and not isinstance(error, UserError):
            raise UserError(f"{output}: {partial}, where it was being written, was removed meanwhile") from error
        raise


def _remove_leftovers(target: Path) -> None:
    """Removes what killed exports to the same target left behind."""
    partial = re.compile(re.escape(f".{target.name}.partial-") + "[0-9a-f]{8}")
    replaced = re.compile(re.escape(f".{target.name}.replaced-") + "[0-9a-f]{8}")
    published = target.exists()
    for path in list(target.parent.iterdir()):
        if not (partial.fullmatch(path.name) or (published and replaced.fullmatch(path.name))) or path.is_symlink():
            continue
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        with suppress(OSError):  # locked by a running export, or a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(path, lock):
                shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _publish(partial: Path, target: Path, overwrite: bool) -> None:
    """Renames ``partial`` to ``target``; an old folder there is moved to ``partial`` or deleted."""
    check_output(target, overwrite)
    replace = target.exists()
    try:
        _renameat2(partial, target, RENAME_EXCHANGE if replace else RENAME_NOREPLACE)
    except FileExistsError:  # made after the check; plain rename would silently replace an empty folder
        raise UserError(f"{target}: came into being during the export; choose another folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV):
            raise
        _publish_in_steps(partial, target, replace)


def _publish_in_steps(partial: Path, target: Path, replace: bool) -> None:
    aside = _hidden(target, "replaced")
    if replace:
        target.rename(aside)
    try:
        partial.rename(target)
    except BaseException:
        if replace:
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _renameat2(source: Path, destination: Path, flags: int) -> None:
    """The system call that renames and, unlike ``os.rename``, can refuse to replace or swap the two names."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        raise OSError(errno.ENOSYS, "renameat2")
    if library.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(destination), ctypes.c_uint(flags)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(source), None, str(destination))
