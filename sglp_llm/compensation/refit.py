"""The last linear layer of the MLP before each cut, fitted anew on its inputs to the whole model's hidden states after the cut.

`linear` multiplies the layer's output, which has the width of the hidden states; here every input has a row of its own, several
times as many. `sglp_llm.method.least_squares` has the equations: with ``a`` the inputs, ``x`` the hidden states that leave the
decoder layer, ``y`` the whole model's after the cut and ``w`` the weights of the tokens, what is added to the matrix is
``(a'wa + lambda I)^-1 a'w (y - x)`` (our choice).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from sglp_llm.adapters import Branch, DecoderAdapter
from sglp_llm.compensation.base import LeastSquares, RidgeFit
from sglp_llm.compensation.repair.branch import branch_inputs, changed, inputs_of
from sglp_llm.compensation.repair.cuts import CutFit
from sglp_llm.errors import UserError
from sglp_llm.method.least_squares import MatrixEquations
from sglp_llm.processes import Processes


@dataclass(frozen=True)
class Refit(LeastSquares):
    """Fits the change of a linear layer's matrix rather than a map of its output."""

    of_inputs: ClassVar[bool] = True

    @property
    def matrices(self) -> int:
        # One as wide as the inputs in the sums of each part and two while solving; the others are as wide as the hidden states.
        return 5

    def check(self, adapter: DecoderAdapter, config: object) -> None:
        super().check(adapter, config)
        branch = adapter.mlp_branch(config)
        if branch.is_stacked:
            raise UserError(
                f"compensate {self.name} does not work for this {adapter.display_name} model: its MLP ends in a stack of "
                f"matrices ({branch.last}), and not in one linear layer; --compensate linear works there"
            )

    def new_fit(self, width: int, device: torch.device) -> CutFit:
        return _MatrixFit(width, device)


class _MatrixFit(RidgeFit):
    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__({})
        self._width, self._device = width, device

    def watching(self, layer: nn.Module, branch: Branch) -> AbstractContextManager[list[torch.Tensor]]:
        inputs = inputs_of(layer, branch)
        self.sums |= {part: MatrixEquations(inputs, self._device, self._width) for part in ("fit", "held_out")}
        return branch_inputs(layer, branch)

    def new_values(self, layer: nn.Module, branch: Branch, processes: Processes) -> Mapping[str, torch.Tensor] | None:
        change = self.change(processes)
        return None if change is None else changed(layer, branch, change)


METHOD = Refit("refit", MatrixEquations, is_channelwise=False)
