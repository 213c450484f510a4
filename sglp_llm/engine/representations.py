"""Picks the tokens that stand for a layer in CKA, and hands them to the accumulator minibatch by minibatch."""

from __future__ import annotations

import torch

from sglp_llm.engine.observer import Batch, Need, Observer
from sglp_llm.method.similarity import CKAAccumulator
from sglp_llm.processes import Processes
from sglp_llm.records import SimilarityMatrix


def chosen_positions(batch: Batch, index: int, tokens: int, count: int, last: bool = False) -> torch.Tensor:
    """The positions of one sequence that stand for it: position i of m is ``floor(i * T / m)`` of its T real ones.

    Args:
        batch: The sequences.
        index: Which of them.
        tokens: Length of the sequences, padding included.
        count: m; a sequence with fewer real positions gives all of them.
        last: Take the last real position instead.

    Returns:
        ``[positions]`` int64 on the CPU.
    """
    valid = torch.arange(tokens) if batch.mask is None else batch.mask[index].nonzero().flatten().cpu()
    if last:
        return valid[-1:]
    count = min(count, len(valid))
    return valid[torch.arange(count) * len(valid) // max(count, 1)]


class CKAObserver(Observer):
    """A CKA minibatch is some consecutive calibration sequences x some evenly spaced positions of each.

    Positions are those of `chosen_positions`. The last minibatch may be smaller; it counts like the others (our choice).

    Args:
        num_layers: Number of decoder layers.
        kernel: ``"cosine"`` or ``"linear"``.
        sequences: Calibration sequences a minibatch.
        positions: Positions a sequence.
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
        """The similarity matrix of everything that was shown until the pass ended."""
        return self._accumulator.result()

    def _flush(self) -> None:
        self._accumulator.update([torch.cat(rows[: self.together]) for rows in self._rows])
        for rows in self._rows:
            del rows[: self.together]
