"""File systems in memory, which take the rights of an administrator."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A new folder where something is mounted: by default an empty file system of 64 MB."""
    folder.mkdir()
    command = ["mount", *(options or ("-t", "tmpfs", "-o", "size=64m", "tmpfs")), str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs an administrator")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Changes what is mounted there, such as its size."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
