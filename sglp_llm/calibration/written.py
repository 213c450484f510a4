"""Text that a model writes, stored batch by batch, so that an interrupted run resumes with the same text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from sglp_llm.errors import UserError
from sglp_llm.progress import Progress, silent
from sglp_llm.small_files import read_json_lines

MOST_BATCH_BYTES = 2**27

EMPTY_BATCHES = 8
"""Generation stops with an error after this many consecutive batches without text."""

Row = Mapping[str, Any]
"""One document, as it is stored in a line of JSON."""


def written_rows(
    folder: Path,
    name: str,
    batch: Callable[[int], list[Row]],
    size: Callable[[Row], int],
    tokens: int | None,
    progress: Progress = silent,
) -> Path:
    """Stores the rows of numbered batches until they have enough tokens; a file that exists already is reused.

    Args:
        folder: Folder of the file; created if it is missing.
        name: Name of the file without its ending; it says everything that the rows depend on.
        batch: The rows of a batch; none at all = there are no more.
        size: Tokens of a row; rows of 0 are left out.
        tokens: Least number of tokens of all rows; ``None`` = all batches.
        progress: Reports the tokens.

    Returns:
        A JSONL file.

    Raises:
        UserError: `EMPTY_BATCHES` batches in a row have rows of 0 tokens only.
    """
    file = folder / f"{name}.jsonl"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    kept: list[Row] = []
    parts: list[Path] = []
    written = empty = 0
    with progress("Writing", tokens or 0) as advance:
        for number in count():
            parts.append(folder / f"{name}.{number:06d}.jsonl")
            rows = _stored(parts[-1])
            if rows is None:
                rows = batch(number)
                _store(parts[-1], rows)
            if not rows:
                break
            sizes = list(map(size, rows))
            kept += [row for row, length in zip(rows, sizes, strict=True) if length]
            advance(sum(sizes) if tokens is None else min(sum(sizes), tokens - written))
            written += sum(sizes)
            if tokens is not None and written >= tokens:
                break
            empty = 0 if any(sizes) else empty + 1
            if empty == EMPTY_BATCHES:
                raise UserError(
                    f"self: the model writes no text ({EMPTY_BATCHES * len(rows)} documents in a row are empty);"
                    " give it prompts, or another calibration text"
                )
    _store(file, kept)
    for part in parts:
        part.unlink(missing_ok=True)
    return file


def _stored(file: Path) -> Sequence[Row] | None:
    """The rows of a stored batch; ``None`` if the file is missing or incomplete."""
    try:
        return read_json_lines(file, "batch of written text", MOST_BATCH_BYTES) if file.exists() else None
    except UserError:
        return None


def _store(file: Path, rows: Sequence[Row]) -> None:
    """Writes a file atomically; concurrent runs write the same content."""
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(file)
