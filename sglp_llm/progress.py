"""The interface through which long computations report progress, independent of how it is displayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
"""Called with the number of units that were just finished."""

Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""``with progress("description", total) as advance: ... advance(1)``."""


@contextmanager
def silent(description: str, total: int) -> Iterator[Advance]:
    """A `Progress` that displays nothing: the default of every library function."""
    yield lambda _: None
