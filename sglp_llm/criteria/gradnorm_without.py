"""Gradient norm of the whole model without the layer: the variant of GradNorm that is closest to SGLP's public code for vision.

That code scores shortened networks instead of layers (arXiv 2410.14720), with random weights. Here the trained weights are kept.
"""

from __future__ import annotations

import torch

from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine import Batch, Need, Observer, PassSettings, run_pass
from sglp_llm.engine.modes import skipped
from sglp_llm.errors import unknown
from sglp_llm.processes import Processes
from sglp_llm.trials import Trials

BEST = ("largest", "smallest")


class GradNormWithout(ScoreCriterion):
    """``mean over sequences of sqrt(sum over the parameters p of all other decoder layers of ||dLoss/dp||^2)``, layer l skipped.

    Costs one forward and one backward pass per layer over the trial sequences.

    Args:
        num_layers: Number of decoder layers.
        seed: Not used.
        best: Which norm marks the best shortened model: ``largest`` (a large gradient means important, as elsewhere in SGLP;
            the score is the negative norm) or ``smallest`` (a small gradient means still near the optimum).
    """

    needs = Need.TRIALS
    trial_cost = "1 forward and backward pass a layer"

    def __init__(self, num_layers: int, seed: int = 0, *, best: str = "largest") -> None:
        super().__init__(num_layers, seed)
        if best not in BEST:
            raise unknown("best of gradnorm_without", best, BEST)
        self._sign = -1 if best == "largest" else 1
        self._norms: list[float] = []

    def on_trials(self, trials: Trials) -> None:
        with trials.progress("Trials", self.num_layers) as advance:
            for layer in range(self.num_layers):
                whole = _WholeModel()
                with skipped(trials.model.layers, [layer]):
                    settings = PassSettings(trials.batch_size, processes=trials.processes)
                    run_pass(trials.model, trials.calibration, [whole], settings)
                self._norms.append(whole.mean)
                advance(1)

    def scores(self) -> list[float]:
        return [self._sign * norm for norm in self._norms]


class _WholeModel(Observer):
    """The mean over sequences of the gradient norm of all decoder layers together."""

    needs = Need.GRADIENT_NORMS

    def __init__(self) -> None:
        self._squares: dict[int, torch.Tensor] = {}

    def on_gradient_norm(self, layer: int, batch: Batch, name: str, squared: torch.Tensor) -> None:
        known = self._squares.get(batch.first)
        self._squares[batch.first] = squared if known is None else known + squared.to(known.device)

    def on_pass_end(self, processes: Processes) -> None:
        squares = list(self._squares.values()) or [torch.zeros(0, dtype=torch.float64)]
        norms = torch.cat(squares).sqrt().cpu()
        total, count = processes.sum(torch.tensor([float(norms.sum()), len(norms)], dtype=torch.float64)).tolist()
        self.mean = total / count


CRITERION = GradNormWithout
