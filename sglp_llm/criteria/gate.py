"""Taylor importance of a gate on what the layer adds to the hidden states (Molchanov et al., arXiv 1906.10771)."""

from __future__ import annotations

import torch

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine import Batch, Need
from sglp_llm.engine.totals import LayerTotals
from sglp_llm.errors import UserError
from sglp_llm.method.exact import exact
from sglp_llm.processes import Processes


class Gate(ScoreCriterion):
    """How much the loss rises when the layer's gate goes from 1 to 0, by a Taylor expansion around 1.

    With ``x_{l+1} = x_l + a_t f_l(x_l)_t`` at position t and ``g_t = dLoss/da_t = <dLoss/dx_{l+1}, x_{l+1} - x_l>_t``, where
    Loss is the mean over the T predictions of one sequence:

    * order 2: the mean over sequences of ``sum_t (-g_t + T g_t^2 / 2)``. The second term is half the Hessian's diagonal in
      the Fisher approximation: T Loss is the sequence's negative log-likelihood, whose Hessian is about ``(T g_t)^2``.
    * order 1: the mean over sequences of ``abs(sum_t g_t)``, the gradient norm of one gate for the whole sequence.

    Args:
        num_layers: Number of decoder layers.
        seed: Not used.
        order: 1 or 2.
    """

    needs = Need.STATE_GRADIENTS

    def __init__(self, num_layers: int, seed: int = 0, *, order: int = 2) -> None:
        super().__init__(num_layers, seed)
        if order not in (1, 2):
            raise UserError(f"order of gate is 1 or 2, not {order!r}")
        self._order = order
        self._sums, self._sequences = LayerTotals(num_layers), [0] * num_layers
        self._scores = [0.0] * num_layers

    def on_state_gradient(
        self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        gates = batch.real((exact(gradient) * (exact(leaving) - exact(entering))).sum(-1))
        if self._order == 1:
            score = gates.sum(dim=1).abs()
        else:
            predictions = [number - 1 for number in batch.positions(gates.shape[1])]
            score = sum((number / 2 * own.square() - own).sum() for number, own in zip(predictions, gates, strict=True))
        self._sums.add(layer, score.sum())
        self._sequences[layer] += batch.size

    def on_pass_end(self, processes: Processes) -> None:
        counts = torch.tensor(self._sequences, dtype=torch.float64)
        sums, counts = processes.sum(torch.stack([self._sums.on_host(), counts]))
        self._scores = (sums / counts).tolist()

    def scores(self) -> list[float]:
        return self._scores


CRITERION = Gate
