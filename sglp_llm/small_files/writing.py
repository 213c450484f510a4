"""Writes small files of our own that later runs read."""

from __future__ import annotations

from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Writes a file that one run rewrites and a later one reads: a kill leaves it as it was, or as it is now."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
