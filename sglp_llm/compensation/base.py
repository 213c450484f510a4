"""The base class of compensation methods, and the least squares method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from sglp_llm.adapters import Branch, DecoderAdapter
from sglp_llm.calibration import CalibrationSet, split
from sglp_llm.compensation.repair.branch import branch_outputs, folded
from sglp_llm.compensation.repair.cuts import CutFit, Target, repair_cuts
from sglp_llm.compensation.repair.settings import DEFAULTS, FitSettings
from sglp_llm.errors import UserError
from sglp_llm.method.least_squares import ChosenRidge, NormalEquations, best_ridge
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
        matrices: Number of float64 matrices at its peak, for the memory prediction: ``[hidden, hidden]``, or as wide as the MLP's
            hidden layer where it is ``of_inputs``.
        of_inputs: See ``matrices``.
        refined_sequences: Number of sequences per gradient computation, for the memory prediction; 0 without gradients.
    """

    of_inputs: ClassVar[bool] = False

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
        if not branch.last:
            raise UserError(
                f"compensate {self.name} does not work for this {adapter.display_name} model: the linear layer at the end of its "
                "MLP was not found; --compensate none works there"
            )
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
        self.check(model.adapter, model.config)
        repair = repair_cuts(model, calibration, removed, self.new_fit, settings, self.target)
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

    def new_fit(self, width: int, device: torch.device) -> CutFit:
        """The fit of one cut, for hidden states of a width."""
        return FactorFit({part: self.equations(width, device) for part in ("fit", "held_out")})


class RidgeFit(CutFit):
    """A fit by normal equations whose ridge is chosen on held-out rows.

    Args:
        sums: Equations without rows yet, for ``fit`` and ``held_out``.
    """

    def __init__(self, sums: dict[str, NormalEquations]) -> None:
        self.sums = sums
        self._found: ChosenRidge | None = None

    def on_rows(self, name: str, part: torch.Tensor, leaving: torch.Tensor, target: torch.Tensor) -> None:
        self.sums[name].add(part, leaving, target)

    def change(self, processes: Processes) -> torch.Tensor | None:
        """The solution for the chosen ridge; ``None`` if no ridge gives a lower held-out error. A collective call.

        Raises:
            UserError: Hidden states were not finite.
        """
        for part in self.sums.values():
            part.gather(processes)
            if not part.is_finite:
                raise UserError(
                    "hidden states around a cut are not finite: the weights are damaged, or the dtype is too small "
                    "(try --dtype float32)"
                )
        self._found = best_ridge(self.sums["fit"], self.sums["held_out"])
        self.sums.clear()  # frees up to four float64 matrices
        return self._found.change

    def report(self) -> dict[str, Any]:
        assert self._found is not None
        errors = zip(("fit", "held_out"), self._found.errors, strict=True)
        return {
            "ridge": self._found.ridge,
            "errors": {part: {"without": before, "with": after} for part, (before, after) in errors},
        }


class FactorFit(RidgeFit):
    """The output of the branch is multiplied by a map."""

    def watching(self, layer: nn.Module, branch: Branch) -> AbstractContextManager[list[torch.Tensor]]:
        return branch_outputs(layer, branch)

    def new_values(self, layer: nn.Module, branch: Branch, processes: Processes) -> Mapping[str, torch.Tensor] | None:
        change = self.change(processes)
        if change is None:
            return None
        unit = torch.eye(len(change), dtype=change.dtype, device=change.device) if change.ndim > 1 else 1
        return folded(layer, branch, change + unit)
