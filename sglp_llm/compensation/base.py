"""The base class of compensation methods, and the least squares method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sglp_llm.adapters import DecoderAdapter
from sglp_llm.calibration import CalibrationSet, split
from sglp_llm.compensation.repair.cuts import CutFit, Target, repair_cuts
from sglp_llm.compensation.repair.settings import DEFAULTS, FitSettings
from sglp_llm.errors import UserError
from sglp_llm.method.least_squares import NormalEquations, RidgeFit, best_ridge
from sglp_llm.models.loading import DecoderModel
from sglp_llm.processes import Processes

NewEquations = Callable[[int, torch.device], NormalEquations]
"""Creates empty equations for a width, on a device."""


@dataclass(frozen=True)
class Compensated:
    """The result of a method.

    Attributes:
        replaced: New values of parameters of kept layers, by name in the model, in the form of `PrunePlan.replaced`.
        report: What was done and how well it works, as plain data, for `PrunePlan.compensation`.
    """

    replaced: Mapping[str, torch.Tensor]
    report: Mapping[str, Any]


class Method(ABC):
    """Compensates for removed layers with new values of kept weights; names and shapes of all tensors are unchanged.

    Attributes:
        matrices: Number of float64 matrices ``[hidden, hidden]`` at its peak, for the memory prediction.
        refined_sequences: Number of sequences per gradient computation, for the memory prediction; 0 without gradients.
    """

    @property
    def refined_sequences(self) -> int:
        return 0

    @property
    @abstractmethod
    def matrices(self) -> int: ...

    @abstractmethod
    def check(self, adapter: DecoderAdapter, config: object) -> None:
        """Rejects a model that the method does not support, before any work is done.

        Raises:
            UserError: The method does not work for this model.
        """

    @abstractmethod
    def closed_form(self, model: DecoderModel) -> Method:
        """The closed-form method that this one starts from, or itself: fast enough to try on several sets of layers."""

    @abstractmethod
    def run(
        self,
        model: DecoderModel,
        calibration: CalibrationSet,
        removed: Sequence[int],
        settings: FitSettings = DEFAULTS,
    ) -> Compensated:
        """Computes the new values; the model itself is not changed.

        Args:
            model: The whole model, resident or streamed.
            calibration: At least 2 sequences.
            removed: The removed layers.
            settings: See `FitSettings`.

        Raises:
            UserError: Hidden states or losses are not finite.
        """


@dataclass(frozen=True)
class LeastSquares(Method):
    """Multiplies the output of the MLP before each cut by a map fitted so that the hidden states are closest to the target.

    Attributes:
        name: Name on the command line.
        equations: The class of maps that is fitted.
        is_channelwise: Whether the maps are one factor per channel, which can also be folded into a norm.
        target: The target hidden states, see `Target`.
    """

    name: str
    equations: NewEquations
    is_channelwise: bool
    target: Target = "dense"

    @property
    def matrices(self) -> int:
        # The sums of both parts, two matrices each, and three matrices while solving.
        return 0 if self.is_channelwise else 7

    def check(self, adapter: DecoderAdapter, config: object) -> None:
        branch = adapter.mlp_branch(config)
        if branch.is_norm and not self.is_channelwise:
            raise UserError(
                f"compensate {self.name} does not work for this {adapter.display_name} model: a norm ({branch.last}) follows its "
                "MLP, and takes no matrix; --compensate scale works there"
            )

    def closed_form(self, model: DecoderModel) -> Method:
        return self

    def run(
        self,
        model: DecoderModel,
        calibration: CalibrationSet,
        removed: Sequence[int],
        settings: FitSettings = DEFAULTS,
    ) -> Compensated:
        self.check(model.adapter, model.model.config)
        repair = repair_cuts(
            model,
            calibration,
            removed,
            lambda width, device: _RidgeFit(self.equations, width, device),
            settings,
            self.target,
        )
        parts = split(len(calibration.input_ids), settings.held_out).items()
        report = {
            "method": self.name,
            "target": self.target,
            "sequences": {name: len(part) for name, part in parts},
            "tokens": {name: int(calibration.mask[part.start : part.stop].sum()) for name, part in parts},
            "cuts": repair.cuts,
            "losses": repair.losses,
        }
        return Compensated(repair.tensors, report)


@dataclass
class _RidgeFit(CutFit):
    equations: NewEquations
    width: int
    device: torch.device
    _found: RidgeFit | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._sums = {part: self.equations(self.width, self.device) for part in ("fit", "held_out")}

    def on_rows(self, part: str, branch: torch.Tensor, leaving: torch.Tensor, target: torch.Tensor) -> None:
        self._sums[part].add(branch, leaving, target)

    def factor(self, processes: Processes) -> torch.Tensor | None:
        for part in self._sums.values():
            part.gather(processes)
            if not part.is_finite:
                raise UserError(
                    "hidden states around a cut are not finite: the weights are damaged, or the dtype is too small "
                    "(try --dtype float32)"
                )
        self._found = best_ridge(self._sums["fit"], self._sums["held_out"])
        self._sums.clear()  # frees up to four float64 matrices [hidden, hidden]
        change = self._found.change
        if change is None:
            return None
        return change + (torch.eye(self.width, dtype=change.dtype, device=change.device) if change.ndim > 1 else 1)

    def report(self) -> dict[str, Any]:
        assert self._found is not None
        errors = zip(("fit", "held_out"), self._found.errors, strict=True)
        return {
            "ridge": self._found.ridge,
            "errors": {part: {"without": before, "with": after} for part, (before, after) in errors},
        }
