"""Picks the tokens that stand for a layer in CKA, and hands them to the accumulator minibatch by minibatch."""

from __future__ import annotations

import torch

from sglp_llm.engine.observer import Batch, Need, Observer
from sglp_llm.records import SimilarityMatrix
from sglp_llm.similarity import CKAAccumulator


class CKAObserver(Observer):
    """A CKA minibatch is some consecutive calibration sequences x some evenly spaced positions of each.

    Position i of m is ``floor(i * T / m)`` of the T positions that are not padding, the first included; a sequence with
    fewer positions gives all of them. The last minibatch may be smaller; it counts like the others (our choice).

    Args:
        num_layers: Number of decoder layers.
        kernel: ``"cosine"`` or ``"linear"``.
        sequences: Calibration sequences a minibatch.
        positions: Positions a sequence.
    """

    needs = Need.HIDDEN_STATES

    def __init__(self, num_layers: int, kernel: str = "cosine", sequences: int = 8, positions: int = 64) -> None:
        self._accumulator = CKAAccumulator(kernel)
        self._sequences = sequences
        self._positions = positions
        self._rows: list[list[torch.Tensor]] = [
            [] for _ in range(num_layers)
        ]  # layer -> sequence -> [positions, hidden]

    def on_layer(self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        for index in range(batch.size):
            if batch.mask is None:
                valid = torch.arange(leaving.shape[1])
            else:
                valid = batch.mask[index].nonzero().flatten().cpu()
            count = min(self._positions, len(valid))
            chosen = valid[torch.arange(count) * len(valid) // max(count, 1)]
            self._rows[layer].append(leaving[index, chosen.to(leaving.device)].detach())

    def on_batch_end(self, batch: Batch) -> None:
        while len(self._rows[0]) >= self._sequences:
            self._flush()

    def result(self) -> SimilarityMatrix:
        """The similarity matrix of everything that was shown."""
        if self._rows[0]:
            self._flush()
        return self._accumulator.result()

    def _flush(self) -> None:
        self._accumulator.update([torch.cat(rows[: self._sequences]) for rows in self._rows])
        for rows in self._rows:
            del rows[: self._sequences]
