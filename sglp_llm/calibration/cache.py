"""Where texts that were generated on this machine are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*names: str) -> Path:
    """The folder of that name in this program's cache, ``$XDG_CACHE_HOME/sglp-llm`` or ``~/.cache/sglp-llm``; not made here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("sglp-llm", *names)
