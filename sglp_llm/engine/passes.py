"""One pass over the calibration set, by the engine that suits the model."""

from __future__ import annotations

from collections.abc import Sequence

from sglp_llm.calibration import CalibrationSet
from sglp_llm.engine import resident, streamed
from sglp_llm.engine.ghost import Norms
from sglp_llm.engine.observer import Observer
from sglp_llm.loading import DecoderModel
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent


def run_pass(
    model: DecoderModel,
    calibration: CalibrationSet,
    observers: Sequence[Observer],
    *,
    batch_size: int = 8,
    progress: Progress = silent,
    processes: Processes = ALONE,
    norms: Norms = "auto",
) -> float | None:
    """See `sglp_llm.engine.resident.run_pass` and `sglp_llm.engine.streamed.run_streamed`: the results are the same."""
    run = resident.run_pass if model.weights is None else streamed.run_streamed
    return run(
        model, calibration, observers, batch_size=batch_size, progress=progress, processes=processes, norms=norms
    )
