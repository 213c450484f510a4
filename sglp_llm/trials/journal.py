"""Stores finished pieces of long work on disk, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sglp_llm.errors import UserError, disk_of
from sglp_llm.small_files import read_json

_LOG = logging.getLogger(__name__)


class Journal:
    """One small JSON file per finished piece, each written atomically.

    Args:
        folder: The folder of the files; created if missing.
        setting: Everything that all pieces depend on. A folder with a different setting is rejected.

    Raises:
        UserError: The folder holds pieces of a different setting, or cannot be written to.
    """

    def __init__(self, folder: Path, setting: Mapping[str, Any]) -> None:
        self._folder = folder
        with disk_of(folder):
            folder.mkdir(parents=True, exist_ok=True)
        kept = self._file("setting")
        if not kept.exists():
            self._write(kept, "setting", dict(setting))
        known = self.get("setting")
        if not isinstance(known, dict):
            raise UserError(f"{kept}: damaged, so that it is not known what the folder holds; choose another folder")
        plain = json.loads(json.dumps(setting))
        if changed := sorted(key for key in {*known, *plain} if known.get(key) != plain.get(key)):
            raise UserError(
                f"{folder} holds an unfinished or finished run with another {changed[0]} "
                f"({known.get(changed[0])!r}, now {plain.get(changed[0])!r}); choose another folder"
            )

    def get(self, piece: str) -> Any:
        """The value stored under this name; ``None`` if the piece is not finished, or damaged: a warning names it then."""
        file = self._file(piece)
        if not file.exists():
            return None
        try:
            kept = read_json(file, "journal's piece")
        except UserError:
            kept = None
        if isinstance(kept, dict) and kept.get("piece") == piece and kept.get("sha256") == _digest(kept.get("value")):
            return kept["value"]
        _LOG.warning("%s: damaged, or of an older version; it is made again", file)
        return None

    def once(self, piece: str, compute: Callable[[], Any]) -> Any:
        """The value stored under this name; if there is none, calls ``compute`` and stores its result (plain data)."""
        if (known := self.get(piece)) is not None:
            return known
        self._write(self._file(piece), piece, compute())
        return self.get(piece)  # read back from JSON, so that a resumed run gets the same value

    def _file(self, piece: str) -> Path:
        return self._folder / f"{hashlib.sha256(piece.encode()).hexdigest()[:24]}.json"

    def _write(self, file: Path, piece: str, value: Any) -> None:
        value = json.loads(json.dumps(value))  # numbers as keys become texts
        data = {"piece": piece, "value": value, "sha256": _digest(value)}
        partial = file.with_suffix(f".{os.getpid()}.partial")  # the processes of one run may write concurrently
        try:
            with disk_of(self._folder):
                partial.write_text(json.dumps(data), encoding="utf-8")
                partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def _digest(value: Any) -> str:
    """Of plain data: it tells a whole piece from one that was cut off, mixed up or written to by something else."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
