"""What a launcher (torchrun, accelerate launch) sets in the environment. Without torch, so that ``--help`` stays fast."""

from __future__ import annotations

import os


def process_count() -> int:
    """How many processes the launcher started; 1 without one.

    A cluster may set ``WORLD_SIZE`` for a job without a launcher, so a process without ``RANK`` counts as a single one.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def process_index() -> int:
    """The rank of this process among all processes on all hosts."""
    return int(os.environ["RANK"]) if process_count() > 1 else 0
