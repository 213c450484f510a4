"""What an export has written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        files: What was written.
        notes: What the files do not hold, or what was not checked, one line each.
        next_command: How the other program takes them.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    next_command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "files": list(map(str, self.files)), "notes": list(self.notes)}
