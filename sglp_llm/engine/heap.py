"""What was freed goes back to the system."""

from __future__ import annotations

import ctypes
import sys


def trim() -> None:
    """Gives back what the C allocator keeps for later; on Linux with glibc, elsewhere nothing happens (musl keeps little)."""
    if sys.platform == "linux":
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if give_back is not None:
            give_back(0)
