"""The contiguous layers with the least angular distance from input to output hidden states (Gromov et al., arXiv 2403.17887)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sglp_llm.criteria.base import SetCriterion
from sglp_llm.engine import Batch, Need
from sglp_llm.engine.representations import ChosenStates
from sglp_llm.errors import unknown
from sglp_llm.method.exact import exact
from sglp_llm.processes import Processes

TOKENS = ("last", "all")


class Angular(SetCriterion):
    """The n consecutive layers from l on with the least mean ``arccos(cos(x_l, x_{l+n})) / pi``; ties go to the lower l.

    Args:
        num_layers: Number of decoder layers.
        seed: Not used.
        tokens: ``last``: the last token of each sequence, as in the paper; ``all``: up to ``positions`` evenly spaced tokens.
        positions: Maximum number of tokens per sequence for ``all``.
    """

    needs = Need.HIDDEN_STATES
    contiguous = True

    def __init__(self, num_layers: int, seed: int = 0, *, tokens: str = "last", positions: int = 64) -> None:
        super().__init__(num_layers, seed)
        if tokens not in TOKENS:
            raise unknown("tokens of angular", tokens, TOKENS)
        self._chosen = ChosenStates(positions, last=tokens == "last")
        self._states: list[torch.Tensor] = []  # x_0, x_1, ... of the current batch, [tokens, hidden] each
        self._distances = torch.zeros(num_layers + 1, num_layers + 1, dtype=torch.float64)

    def on_layer(self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        if layer == 0:
            self._states = [self._chosen.of(batch, entering)]
        self._states.append(self._chosen.of(batch, leaving))

    def on_batch_end(self, batch: Batch) -> None:
        rows = [each.to(self._states[0].device) for each in self._states]
        states = torch.nn.functional.normalize(exact(torch.stack(rows, dim=1)), dim=-1)  # [tokens, L + 1, hidden]
        cosines = (states @ states.transpose(1, 2)).clamp(-1, 1)
        self._distances = self._distances.to(states.device, non_blocking=True)
        self._distances += torch.arccos(cosines).sum(dim=0) / math.pi
        self._states = []

    def on_pass_end(self, processes: Processes) -> None:
        self._distances = processes.sum(self._distances.cpu())

    def distances(self) -> list[list[float]]:
        """``[L + 1][L + 1]``: ``arccos(cos(x_i, x_j)) / pi``, summed over the selected tokens."""
        distances: list[list[float]] = self._distances.tolist()
        return distances

    def choose(self, n: int, removable: Sequence[int]) -> list[int]:
        starts = self.staying.windows(n, removable, "angular")
        first = min(starts, key=lambda start: (float(self._distances[start, start + n]), start))
        return list(range(first, first + n))


CRITERION = Angular
