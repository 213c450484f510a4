"""`auto`, refined by gradient descent: some weights are trained to match the whole model's predictions.

The objective is that of knowledge distillation (Hinton et al., arXiv 1503.02531), on the calibration sequences only: the KL
divergence from the whole model's next-token distribution. Trained are the output projections of attention and MLP and the
parameters of the norms, from the layer before the first cut on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar

from sglp_llm.adapters import DecoderAdapter
from sglp_llm.calibration import CalibrationSet, split
from sglp_llm.compensation import auto
from sglp_llm.compensation.base import Compensated, Method
from sglp_llm.compensation.repair.cuts import cuts_of
from sglp_llm.compensation.repair.refine import MOVING_SHARE, REFINED_BYTES, Quality, Schedule, refinable_names, refine
from sglp_llm.compensation.repair.settings import DEFAULTS, FitSettings
from sglp_llm.models.devices import free_on
from sglp_llm.models.loading import DecoderModel
from sglp_llm.processes import ALONE, Processes

_START_SAMPLES = 64
"""Maximum number of sequences for the closed form, which needs fewer. They are fit sequences of the refinement (if it has at
least two), and the closed form makes its own held-out split of them."""


@dataclass(frozen=True)
class Learned(Method):
    """Starts from the closed form of `auto`, and refines it.

    In the report ``losses`` and ``cuts`` are those of the closed form on its sequences. The effect of the refinement is under
    ``refined``, where ``without`` means the closed form.

    Refined values are used only if they lower the divergence and do not raise the loss, on the held-out sequences and on as many
    fit sequences. Otherwise the closed form is used.

    Attributes:
        schedule: The schedule of the refinement.
    """

    schedule: Schedule = field(default_factory=Schedule)

    of_inputs: ClassVar[bool] = True

    @property
    def matrices(self) -> int:
        return auto.METHOD.matrices

    @property
    def refined_sequences(self) -> int:
        return self.schedule.sequences

    def check(self, adapter: DecoderAdapter, config: object) -> None:
        """Accepts every family."""

    def closed_form(self, model: DecoderModel) -> Method:
        return auto.METHOD.closed_form(model)

    def run(
        self,
        model: DecoderModel,
        calibration: CalibrationSet,
        removed: Sequence[int],
        settings: FitSettings = DEFAULTS,
    ) -> Compensated:
        parts = split(len(calibration.input_ids), settings.held_out)
        start = self.closed_form(model).run(
            model,
            calibration.first(max(2, min(_START_SAMPLES, len(parts.fit)))),
            removed,
            settings,
        )
        names = affordable(model, refinable(model, removed), settings.processes)
        if not names:
            return Compensated(start.replaced, {**start.report, "method": "learned", "refined": {"taken": False}})
        found = refine(
            model,
            calibration,
            removed,
            names,
            start.replaced,
            parts,
            self.schedule,
            progress=settings.progress,
            processes=settings.processes,
        )
        reason = _reason_against(found.before, found.after)
        dtype_of = settings.stored or (lambda _: model.model.dtype)
        values = {} if reason else {name: value.to(dtype_of(name)) for name, value in found.values.items()}
        refined: dict[str, Any] = {
            "parameters": sum(value.numel() for value in found.values.values()),
            "epochs": self.schedule.epochs,
            "sequences": {part: len(members) for part, members in found.judged_on.items()},
            "divergences": {
                part: {"without": _number(found.before[part].divergence), "with": _number(found.after[part].divergence)}
                for part in found.before
            },
            "losses": {
                part: {"without": _number(found.before[part].loss), "with": _number(found.after[part].loss)}
                for part in found.before
            },
            "held_out_divergences": [_number(value) for value in found.held_out_divergences],
            "taken": not reason,
            **({"reason": reason} if reason else {}),
        }
        report = {**start.report, "method": "learned", "start": start.report.get("method"), "refined": refined}
        return Compensated({**start.replaced, **values}, report)


def refinable(model: DecoderModel, removed: Sequence[int]) -> list[str]:
    """The parameters that are trained (see the module docstring); none if the only cut is at the front.

    Args:
        model: The whole model; only its structure is used.
        removed: The removed layers.

    Returns:
        Names of parameters in the model.
    """
    starts = [cut.start for cut in cuts_of(removed) if cut.start]
    if not starts:
        return []
    kept = [index for index in range(min(starts) - 1, model.num_layers) if index not in removed]
    width = model.config.hidden_size
    return [
        f"{model.adapter.layers}.{index}.{name}"
        for index in kept
        for name in refinable_names(model.layers[index], model.adapter, width)
    ]


def affordable(model: DecoderModel, names: Sequence[str], processes: Processes = ALONE) -> list[str]:
    """The parameters of as many layers as fit on the device, front to back: those near the first cut come first.

    Args:
        model: The whole model.
        names: See `refinable`.
        processes: All refine what the main one can; a collective call.
    """
    free = free_on(model.input_device)
    if free is None:
        return list(names)
    room, kept = MOVING_SHARE * free, 0
    layers = [
        list(own) for _, own in groupby(names, key=lambda name: name.removeprefix(model.adapter.layers).split(".")[1])
    ]
    for own in layers:
        numbers = sum(model.model.get_parameter(name).numel() for name in own)
        room -= numbers * (REFINED_BYTES + model.model.dtype.itemsize)
        kept += room >= 0
    kept = processes.agreed(max(kept, 1))
    return [name for own in layers[:kept] for name in own]


def _reason_against(before: dict[str, Quality], after: dict[str, Quality]) -> str | None:
    for part, words in (("held_out", "held-out sequences"), ("fit", "sequences that it was fitted on")):
        if not after[part].divergence < before[part].divergence:
            return f"it does not lower the divergence on the {words}"
        if not after[part].loss <= before[part].loss:
            return f"it raises the loss on the {words}"
    return None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


METHOD = Learned()
