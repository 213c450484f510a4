"""The cache folder for generated text."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*names: str) -> Path:
    """A folder in the cache ``$XDG_CACHE_HOME/sglp-llm``, by default ``~/.cache/sglp-llm``; it is not created."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("sglp-llm", *names)
