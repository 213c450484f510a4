"""Measures on the result of a trial: loss, KL divergence from the whole model, CKA of the output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from sglp_llm.engine import Batch
from sglp_llm.engine.loss import sequence_loss
from sglp_llm.engine.replay import Replay
from sglp_llm.engine.representations import CKAObserver
from sglp_llm.method.exact import exact
from sglp_llm.processes import Processes
from sglp_llm.trials.observer import Removed, TrialObserver


class _MeanMeasure(TrialObserver):
    """The mean over sequences of one number per sequence."""

    def __init__(self) -> None:
        self._sums: dict[Removed, torch.Tensor] = {}  # on the device: moving it to the host would wait for the trial
        self._sequences: dict[Removed, int] = defaultdict(int)
        self._means: dict[Removed, float] = {}

    def _add(self, removed: Removed, values: torch.Tensor) -> None:
        value = exact(values).sum()
        self._sums[removed] = self._sums[removed] + value if removed in self._sums else value
        self._sequences[removed] += len(values)

    def on_end(self, sets: Sequence[Removed], processes: Processes) -> None:
        sums = torch.zeros(len(sets), dtype=torch.float64)
        if self._sums:
            sums = torch.stack([self._sums[removed] for removed in sets]).cpu()
        counts = torch.tensor([self._sequences[removed] for removed in sets], dtype=torch.float64)
        totals = processes.sum(torch.stack([sums, counts], dim=1)).tolist()
        self._means |= {removed: total / count for removed, (total, count) in zip(sets, totals, strict=True)}

    def means(self) -> dict[Removed, float]:
        """The mean for every set, over all sequences it was tried on."""
        return self._means


class LossMeasure(_MeanMeasure):
    """Mean token negative log-likelihood of a sequence, averaged over sequences."""

    def on_trial(self, removed: Removed, batch: Batch, replay: Replay, final: torch.Tensor) -> None:
        self._add(removed, sequence_loss(replay.logits(final), replay.ids, replay.mask))


class KLMeasure(_MeanMeasure):
    """KL(dense next-token distribution || that of the trial), mean over a sequence's positions, averaged over sequences."""

    reference = frozenset[int]()

    def on_reference(self, batch: Batch, replay: Replay, final: torch.Tensor) -> None:
        self._log_dense = torch.log_softmax(replay.logits(final).float(), dim=-1)
        self._dense = self._log_dense.exp()
        self._entropy = (self._dense * self._log_dense).sum(dim=-1)

    def on_trial(self, removed: Removed, batch: Batch, replay: Replay, final: torch.Tensor) -> None:
        log_trial = torch.log_softmax(replay.logits(final).float(), dim=-1)
        divergence = self._entropy - torch.einsum("btv,btv->bt", self._dense, log_trial)
        mask = batch.mask_on(divergence.device)
        mean = divergence.mean(dim=1) if mask is None else (divergence * mask).sum(dim=1) / mask.sum(dim=1)
        self._add(removed, mean)


class OutputCKA(TrialObserver):
    """CKA between the hidden states that leave the last layer (before the final norm) of the reference and of a trial.

    Args:
        reference: Removed layers of the model that trials are compared with.
        kernel: CKA kernel.
        sequences: Calibration sequences per CKA minibatch.
        positions: Positions per sequence.
    """

    def __init__(self, reference: Removed, kernel: str, sequences: int, positions: int) -> None:
        self.reference = reference
        self._settings = kernel, sequences, positions
        self.together = sequences
        self._pairs: dict[Removed, CKAObserver] = {}

    def on_reference(self, batch: Batch, replay: Replay, final: torch.Tensor) -> None:
        self._current = final

    def on_trial(self, removed: Removed, batch: Batch, replay: Replay, final: torch.Tensor) -> None:
        pair = self._pair(removed)
        for side, states in enumerate((self._current, final)):
            pair.on_layer(side, batch, states, states)
        pair.on_batch_end(batch)

    def on_end(self, sets: Sequence[Removed], processes: Processes) -> None:
        for removed in sets:
            self._pair(removed).on_pass_end(processes)

    def _pair(self, removed: Removed) -> CKAObserver:
        return self._pairs.setdefault(removed, CKAObserver(2, *self._settings))

    def similarities(self) -> dict[Removed, float]:
        """The CKA for every set that was tried."""
        return {removed: float(pair.result().values[0, 1]) for removed, pair in self._pairs.items()}
