"""Settings for fitting and evaluating a compensation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent

DtypeOf = Callable[[str], torch.dtype]
"""Returns the dtype in which a parameter will be stored, given its name in the model."""


@dataclass(frozen=True)
class FitSettings:
    """Settings of a compensation.

    Attributes:
        held_out: Share of the sequences, the last ones, that is held out of the fit and used to evaluate it.
        stored: New values are rounded to this dtype before they are evaluated; ``None`` means the model's own dtype.
        batch_size: Sequences per forward pass of a layer; results do not depend on it, except for rounding.
        progress: Progress callback.
        processes: Each takes its share of the sequences; all return the same result.
        bfloat16: Whether the losses that decide about new values are computed with matrix products in bfloat16, whatever the
            model's dtype. The fit itself never is.
    """

    held_out: float = 0.25
    stored: DtypeOf | None = None
    batch_size: int = 8
    progress: Progress = silent
    processes: Processes = ALONE
    bfloat16: bool = False


DEFAULTS = FitSettings()
