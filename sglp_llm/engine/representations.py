"""Samples the tokens whose hidden states represent a layer in CKA, and accumulates CKA over minibatches."""

from __future__ import annotations

import torch

from sglp_llm.engine.observer import Batch, Need, Observer
from sglp_llm.method.similarity import CKAAccumulator
from sglp_llm.processes import Processes
from sglp_llm.records import SimilarityMatrix


def chosen_positions(batch: Batch, index: int, tokens: int, count: int, last: bool = False) -> torch.Tensor:
    """Evenly spaced positions of one sequence: the i-th of m is number ``floor(i * T / m)`` of its T real positions.

    Args:
        batch: The sequences.
        index: Index of the sequence in the batch.
        tokens: Length of the sequences, padding included.
        count: m; a sequence with fewer real positions uses all of them.
        last: Take only the last real position instead.

    Returns:
        ``[positions]`` int64 on the CPU.
    """
    valid = torch.arange(tokens) if batch.mask is None else batch.mask[index].nonzero().flatten().cpu()
    if last:
        return valid[-1:]
    count = min(count, len(valid))
    return valid[torch.arange(count) * len(valid) // max(count, 1)]


class CKAObserver(Observer):
    """CKA between layers; a minibatch is a number of consecutive calibration sequences x evenly spaced positions of each.

    Positions are those of `chosen_positions`. The last minibatch may be smaller and has the same weight (our choice).

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
        self._positions = positions
        self._rows: list[list[torch.Tensor]] = [
            [] for _ in range(num_layers)
        ]  # layer -> sequence -> [positions, hidden]

    def on_layer(self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        for index in range(batch.size):
            chosen = chosen_positions(batch, index, leaving.shape[1], self._positions)
            self._rows[layer].append(leaving[index, chosen.to(leaving.device)].detach())

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
