"""Samples the tokens whose hidden states represent a layer in CKA, and accumulates CKA over minibatches."""

from __future__ import annotations

import torch

from sglp_llm.engine.observer import Batch, Need, Observer
from sglp_llm.method.similarity import CKAAccumulator
from sglp_llm.processes import Processes
from sglp_llm.records import SimilarityMatrix


class ChosenStates:
    """Picks the hidden states at evenly spaced positions of every sequence of a batch.

    The i-th of m positions is number ``floor(i * T / m)`` of a sequence's T real ones. Their indices are found on the host once a
    batch, and moved to each device once.

    Args:
        count: m; a sequence with fewer real positions uses all of them.
        last: Take only the last real position instead.
    """

    def __init__(self, count: int, last: bool = False) -> None:
        self._count, self._last = count, last
        self._batch: Batch | None = None
        self._indices: dict[torch.device, torch.Tensor] = {}
        self.counts: list[int] = []

    def of(self, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """A copy of the states, ``[positions of all sequences, hidden]``; ``counts`` are those of each sequence.

        Args:
            batch: The sequences.
            states: ``[batch, tokens, hidden]``.
        """
        if batch is not self._batch:
            chosen = [self._positions(batch, index, states.shape[1]) for index in range(batch.size)]
            self._batch, self.counts = batch, [len(each) for each in chosen]
            flat = torch.cat([each + index * states.shape[1] for index, each in enumerate(chosen)])
            self._indices = {flat.device: flat}
        if states.device not in self._indices:
            host = self._indices[torch.device("cpu")]
            self._indices[states.device] = host.to(states.device, non_blocking=True)
        return states.detach().flatten(0, 1).index_select(0, self._indices[states.device])

    def _positions(self, batch: Batch, index: int, tokens: int) -> torch.Tensor:
        valid = torch.arange(tokens) if batch.mask is None else batch.mask[index].nonzero().flatten()
        if self._last:
            return valid[-1:]
        count = min(self._count, len(valid))
        return valid[torch.arange(count) * len(valid) // max(count, 1)]


class CKAObserver(Observer):
    """CKA between layers; a minibatch is a number of consecutive calibration sequences x evenly spaced positions of each.

    Positions are those of `ChosenStates`. The last minibatch may be smaller and has the same weight (our choice).

    Args:
        num_layers: Number of decoder layers.
        kernel: ``"cosine"`` or ``"linear"``.
        sequences: Calibration sequences per minibatch.
        positions: Positions per sequence.
    """

    needs = Need.HIDDEN_STATES

    def __init__(self, num_layers: int, kernel: str = "cosine", sequences: int = 8, positions: int = 64) -> None:
        self._accumulator = CKAAccumulator(kernel)
        self.together = sequences
        self._chosen = ChosenStates(positions)
        self._rows: list[list[torch.Tensor]] = [
            [] for _ in range(num_layers)
        ]  # layer -> sequence -> [positions, hidden]

    def on_layer(self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        rows = self._chosen.of(batch, leaving)
        self._rows[layer] += rows.split(self._chosen.counts)

    def on_batch_end(self, batch: Batch) -> None:
        while len(self._rows[0]) >= self.together:
            self._flush()

    def on_pass_end(self, processes: Processes) -> None:
        if self._rows[0]:
            self._flush()
        self._accumulator.gather(len(self._rows), processes)

    def result(self) -> SimilarityMatrix:
        """The similarity matrix over all minibatches of the pass."""
        return self._accumulator.result()

    def _flush(self) -> None:
        self._accumulator.update([torch.cat(rows[: self.together]) for rows in self._rows])
        for rows in self._rows:
            del rows[: self.together]
