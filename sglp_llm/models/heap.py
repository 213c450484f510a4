"""Returns freed memory to the system."""

from __future__ import annotations

import ctypes
import sys


def trim() -> None:
    """Returns the C allocator's free memory to the system. With glibc on Linux only; elsewhere a no-op (musl keeps little)."""
    if sys.platform == "linux":
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if give_back is not None:
            give_back(0)
