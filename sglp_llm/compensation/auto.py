"""`refit`; `linear` for a mixture of experts, and `scale` for a model with a norm behind its MLP, which takes no matrix.

Nothing is compensated where the end of the MLP was not found in a family without a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sglp_llm.adapters import DecoderAdapter
from sglp_llm.calibration import CalibrationSet
from sglp_llm.compensation import linear, refit, scale
from sglp_llm.compensation.base import Compensated, Method
from sglp_llm.compensation.repair.settings import DEFAULTS, FitSettings
from sglp_llm.models.loading import DecoderModel


@dataclass(frozen=True)
class ClosedForm(Method):
    """Chooses between the closed forms when the model is known."""

    of_inputs: ClassVar[bool] = True

    @property
    def matrices(self) -> int:
        return refit.METHOD.matrices

    def check(self, adapter: DecoderAdapter, config: object) -> None:
        """Accepts every family."""

    def closed_form(self, model: DecoderModel) -> Method:
        branch = model.adapter.mlp_branch(model.config)
        if not branch.last:
            return self
        if branch.is_norm:
            return scale.METHOD
        return linear.METHOD if branch.is_stacked else refit.METHOD

    def run(
        self,
        model: DecoderModel,
        calibration: CalibrationSet,
        removed: Sequence[int],
        settings: FitSettings = DEFAULTS,
    ) -> Compensated:
        method = self.closed_form(model)
        return Compensated({}, {}) if method is self else method.run(model, calibration, removed, settings)


METHOD = ClosedForm()
