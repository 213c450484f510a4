"""Stores finished pieces of long work on disk, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sglp_llm.errors import UserError, disk_of


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
            self._write(kept, {"piece": "setting", "value": dict(setting)})
        known = json.loads(kept.read_text(encoding="utf-8"))["value"]
        plain = json.loads(json.dumps(setting))
        if changed := sorted(key for key in {*known, *plain} if known.get(key) != plain.get(key)):
            raise UserError(
                f"{folder} holds an unfinished or finished run with another {changed[0]} "
                f"({known.get(changed[0])!r}, now {plain.get(changed[0])!r}); choose another folder"
            )

    def get(self, piece: str) -> Any:
        """The value stored under this name; ``None`` if the piece is not finished."""
        file = self._file(piece)
        return json.loads(file.read_text(encoding="utf-8"))["value"] if file.exists() else None

    def once(self, piece: str, compute: Callable[[], Any]) -> Any:
        """The value stored under this name; if there is none, calls ``compute`` and stores its result (plain data)."""
        if (known := self.get(piece)) is not None:
            return known
        self._write(self._file(piece), {"piece": piece, "value": compute()})
        return self.get(piece)  # read back from JSON, so that a resumed run gets the same value

    def _file(self, piece: str) -> Path:
        return self._folder / f"{hashlib.sha256(piece.encode()).hexdigest()[:24]}.json"

    def _write(self, file: Path, data: Mapping[str, Any]) -> None:
        partial = file.with_suffix(f".{os.getpid()}.partial")  # the processes of one run may write concurrently
        try:
            with disk_of(self._folder):
                partial.write_text(json.dumps(data), encoding="utf-8")
                partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
