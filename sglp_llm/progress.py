"""How long work tells the outside how far it is, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
"""Call it with the number of units that were just finished."""

Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""``with progress("description", total) as advance: ... advance(1)``."""


@contextmanager
def silent(description: str, total: int) -> Iterator[Advance]:
    """The progress that shows nothing: the default of every function of the library."""
    yield lambda _: None
