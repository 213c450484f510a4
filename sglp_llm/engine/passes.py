"""One pass over the calibration set, with the resident or the streamed engine, depending on the model."""

from __future__ import annotations

from collections.abc import Sequence

from sglp_llm.calibration import CalibrationSet
from sglp_llm.engine import resident, streamed
from sglp_llm.engine.observer import Need, Observer
from sglp_llm.engine.replay import check_states
from sglp_llm.engine.settings import DEFAULTS, PassSettings
from sglp_llm.engine.synaptic_flow import synaptic_flows
from sglp_llm.errors import UserError
from sglp_llm.models.loading import DecoderModel


def run_pass(
    model: DecoderModel,
    calibration: CalibrationSet,
    observers: Sequence[Observer],
    settings: PassSettings = DEFAULTS,
) -> float | None:
    """See `sglp_llm.engine.resident.run_pass` and `sglp_llm.engine.streamed.run_streamed`; both give the same results."""
    if any(observer.needs & (Need.HIDDEN_STATES | Need.BACKWARD) for observer in observers):
        check_states(model, calibration.input_ids[:1].to(model.input_device))
    if model.adapter.is_derived and any(observer.needs & Need.BACKWARD for observer in observers):
        _refuse_shared(model)
    if watching := [observer for observer in observers if Need.SYNAPTIC_FLOW in observer.needs]:
        flows = synaptic_flows(model, settings.progress)
        for observer in watching:
            observer.on_synaptic_flow(flows)
    run = resident.run_pass if model.weights is None else streamed.run_streamed
    return run(model, calibration, observers, settings)


def _refuse_shared(model: DecoderModel) -> None:
    seen: set[int] = set()
    for layer in model.layers:
        own = {id(parameter) for parameter in layer.parameters()}
        if own & seen:
            raise UserError(
                f"layers of a {model.model.config.model_type} model share parameters, and their gradients are no single layer's: "
                "use a criterion without gradients (bi), or choose layers yourself, with --plan"
            )
        seen |= own
