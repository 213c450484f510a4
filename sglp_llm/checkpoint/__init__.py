"""Returns a shortened checkpoint on disk, complete or not at all, and checks it by reloading. Start with `export.py`."""

from __future__ import annotations

from sglp_llm.checkpoint.publish import atomic_folder, check_output, remove_folder

__all__ = ["atomic_folder", "check_output", "remove_folder"]
