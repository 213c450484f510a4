"""How a pass over the calibration set is carried out."""

from __future__ import annotations

from dataclasses import dataclass

from sglp_llm.engine.ghost import Norms
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent


@dataclass(frozen=True)
class PassSettings:
    """What a pass needs to know beside the model, the sequences and the observers; no result depends on it, but for rounding.

    Attributes:
        batch_size: Sequences computed at once where no gradients are taken; with gradients it is always one.
        progress: Told the sequences, or the layers of a streamed model, that are done.
        processes: Those that share the sequences.
        norms: How the norms of gradients are taken where no observer asks for whole gradients.
    """

    batch_size: int = 8
    progress: Progress = silent
    processes: Processes = ALONE
    norms: Norms = "auto"


DEFAULTS = PassSettings()
