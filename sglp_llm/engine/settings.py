"""Settings of a pass over the calibration set."""

from __future__ import annotations

from dataclasses import dataclass

from sglp_llm.engine.norms.ghost import Norms
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent


@dataclass(frozen=True)
class PassSettings:
    """Settings of a pass. The results do not depend on them, except for rounding.

    Attributes:
        batch_size: Sequences per step; one where an observer needs whole gradients (see `gradients.sequences_a_step`).
        progress: Reports finished sequences, or finished layers of a streamed model.
        processes: The processes that share the sequences.
        norms: How the norms of gradients are computed if no observer needs whole gradients.
        gradient_batch: Most sequences per step of a pass with gradients, whose activations take memory; ``None`` = batch_size.
    """

    batch_size: int = 8
    progress: Progress = silent
    processes: Processes = ALONE
    norms: Norms = "auto"
    gradient_batch: int | None = None


DEFAULTS = PassSettings()
