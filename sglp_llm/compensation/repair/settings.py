"""How a compensation is fitted and judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent

DtypeOf = Callable[[str], torch.dtype]
"""The dtype in which a parameter, by its name in the model, will be stored."""


@dataclass(frozen=True)
class FitSettings:
    """What a compensation needs to know beside the model, the sequences and the layers that go.

    Attributes:
        held_out: Share of the sequences, the last ones, that nothing is fitted on: they judge what the others have led to.
        stored: New values are rounded to it before they are judged; ``None`` means the model's own dtype.
        batch_size: Sequences that go through a layer together; no result depends on it, but for rounding.
        progress: Told how far it is.
        processes: Each takes its share of the sequences; all return the same.
    """

    held_out: float = 0.25
    stored: DtypeOf | None = None
    batch_size: int = 8
    progress: Progress = silent
    processes: Processes = ALONE


DEFAULTS = FitSettings()
