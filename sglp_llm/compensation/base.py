"""What a compensation is, and what those share that are fitted by least squares."""

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
"""Makes empty equations for some width, on some device."""


@dataclass(frozen=True)
class Compensated:
    """What a method has found.

    Attributes:
        replaced: New values of parameters of layers that stay, by name in the model, as `PrunePlan.replaced` wants them.
        report: What was done and how well it works, as plain data, for `PrunePlan.compensation`.
    """

    replaced: Mapping[str, torch.Tensor]
    report: Mapping[str, Any]


class Method(ABC):
    """Makes up for removed layers by new values of weights that stay; names and shapes of all tensors remain.

    Attributes:
        matrices: How many float64 matrices ``[hidden, hidden]`` it holds at its peak, for the prediction of memory.
        refined_sequences: How many sequences it computes gradients of at once, for the same; 0 where it has no gradients.
    """

    @property
    def refined_sequences(self) -> int:
        return 0

    @property
    @abstractmethod
    def matrices(self) -> int: ...

    @abstractmethod
    def check(self, adapter: DecoderAdapter, config: object) -> None:
        """Refuses what cannot work, before any work is done.

        Raises:
            UserError: It does not work for this model.
        """

    @abstractmethod
    def closed_form(self, model: DecoderModel) -> Method:
        """What it begins with, or it itself: quick enough to try on several sets of layers."""

    @abstractmethod
    def run(
        self,
        model: DecoderModel,
        calibration: CalibrationSet,
        removed: Sequence[int],
        settings: FitSettings = DEFAULTS,
    ) -> Compensated:
        """Finds the new values; the model itself is not changed.

        Args:
            model: The whole model, resident or streamed.
            calibration: At least 2 sequences.
            removed: The layers that go.
            settings: See `FitSettings`.

        Raises:
            UserError: Hidden states or losses are not finite.
        """


@dataclass(frozen=True)
class LeastSquares(Method):
    """Multiplies what the MLP in front of each cut gives by the map that brings the states closest to where they should be.

    Attributes:
        name: On the command line.
        equations: Which maps are allowed.
        is_channelwise: Whether they are factors of channels, which a norm can take too.
        target: Where the states should be.
    """

    name: str
    equations: NewEquations
    is_channelwise: bool
    target: Target = "dense"

    @property
    def matrices(self) -> int:
        # Sums of both parts, two matrices each; and the three of a solution.
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
        self._sums.clear()  # two or four matrices of the hidden size, in float64
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
