"""What is measured on the outcome of a trial: loss, divergence from the whole model, similarity of the output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from sglp_llm.engine.loss import sequence_loss
from sglp_llm.engine.observer import Batch
from sglp_llm.engine.replay import Replay
from sglp_llm.engine.representations import CKAObserver
from sglp_llm.engine.trial_observer import TrialObserver
from sglp_llm.processes import Processes


class _MeanMeasure(TrialObserver):
    """The mean over sequences of one number a sequence."""

    def __init__(self) -> None:
        self._sums: dict[int, float] = defaultdict(float)
        self._sequences: dict[int, int] = defaultdict(int)
        self._means: dict[int, float] = {}

    def _add(self, layer: int, values: torch.Tensor) -> None:
        self._sums[layer] += float(values.double().sum())
        self._sequences[layer] += len(values)

    def on_end(self, candidates: Sequence[int], processes: Processes) -> None:
        mine = [(self._sums[layer], self._sequences[layer]) for layer in candidates]
        totals = processes.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        self._means = {layer: total / count for layer, (total, count) in zip(candidates, totals, strict=True)}

    def means(self) -> dict[int, float]:
        """The mean of every layer that was tried."""
        return self._means


class LossMeasure(_MeanMeasure):
    """Mean token negative log-likelihood of a sequence, averaged over sequences."""

    def on_trial(self, layer: int, batch: Batch, replay: Replay, final: torch.Tensor) -> None:
        self._add(layer, sequence_loss(replay.logits(final), replay.ids, batch.mask))


class KLMeasure(_MeanMeasure):
    """KL(dense next-token distribution || that of the trial), mean over a sequence's positions, averaged over sequences."""

    needs_dense = True

    def on_batch(self, batch: Batch, replay: Replay, current: torch.Tensor, dense: torch.Tensor) -> None:
        self._log_dense = torch.log_softmax(replay.logits(dense).float(), dim=-1)
        self._dense = self._log_dense.exp()
        self._entropy = (self._dense * self._log_dense).sum(dim=-1)

    def on_trial(self, layer: int, batch: Batch, replay: Replay, final: torch.Tensor) -> None:
        log_trial = torch.log_softmax(replay.logits(final).float(), dim=-1)
        divergence = self._entropy - torch.einsum("btv,btv->bt", self._dense, log_trial)
        if batch.mask is None:
            self._add(layer, divergence.mean(dim=1))
        else:
            mask = batch.mask.to(divergence.device)
            self._add(layer, (divergence * mask).sum(dim=1) / mask.sum(dim=1))


class OutputCKA(TrialObserver):
    """CKA between what leaves the last layer (before the final norm) with and without the tried layer.

    Args:
        kernel: CKA kernel.
        sequences: Calibration sequences a CKA minibatch.
        positions: Positions of each.
    """

    def __init__(self, kernel: str, sequences: int, positions: int) -> None:
        self._settings = kernel, sequences, positions
        self.together = sequences
        self._pairs: dict[int, CKAObserver] = {}

    def on_batch(self, batch: Batch, replay: Replay, current: torch.Tensor, dense: torch.Tensor) -> None:
        self._current = current

    def on_trial(self, layer: int, batch: Batch, replay: Replay, final: torch.Tensor) -> None:
        pair = self._pair(layer)
        for side, states in enumerate((self._current, final)):
            pair.on_layer(side, batch, states, states)
        pair.on_batch_end(batch)

    def on_end(self, candidates: Sequence[int], processes: Processes) -> None:
        for layer in candidates:
            self._pair(layer).on_pass_end(processes)

    def _pair(self, layer: int) -> CKAObserver:
        return self._pairs.setdefault(layer, CKAObserver(2, *self._settings))

    def similarities(self) -> dict[int, float]:
        """The CKA of every layer that was tried."""
        return {layer: float(pair.result().values[0, 1]) for layer, pair in self._pairs.items()}
