"""The interface through which long computations report progress, independent of how it is displayed."""

from __future__ import annotations

import time
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


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the wall time of the block, in seconds, to what a stage has taken."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 3)
