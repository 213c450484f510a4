"""Repeatedly removes the later layer of the pair with the most similar outputs (similarity-based layer pruning)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglp_llm.criteria.base import SetCriterion
from sglp_llm.engine import Batch, Need
from sglp_llm.engine.representations import ChosenStates, CKAObserver
from sglp_llm.errors import unknown
from sglp_llm.method.exact import exact
from sglp_llm.processes import Processes

METRICS = ("cosine", "euclidean", "cka")


class SimilarPairs(SetCriterion):
    """Of all pairs of remaining layers, takes the pair with the most similar outputs and removes its later layer.

    The similarity of two layers' outputs is the mean over tokens of their cosine (``cosine``) or of minus their distance
    (``euclidean``), or their minibatch CKA (``cka``). Tokens are at evenly spaced positions in all three.

    Args:
        num_layers: Number of decoder layers.
        seed: Not used.
        metric: ``cosine``, ``euclidean`` or ``cka``.
        kernel: CKA kernel, for ``cka``.
        sequences: Calibration sequences per CKA minibatch, for ``cka``.
        positions: Positions per sequence.
    """

    needs = Need.HIDDEN_STATES

    def __init__(
        self,
        num_layers: int,
        seed: int = 0,
        *,
        metric: str = "cosine",
        kernel: str = "cosine",
        sequences: int = 8,
        positions: int = 64,
    ) -> None:
        super().__init__(num_layers, seed)
        if metric not in METRICS:
            raise unknown("metric of slp", metric, METRICS)
        self._metric, self._chosen = metric, ChosenStates(positions)
        self._cka = CKAObserver(num_layers, kernel, sequences, positions) if metric == "cka" else None
        self.together = 1 if self._cka is None else self._cka.together
        self._states: list[torch.Tensor] = []  # outputs of the current batch, [tokens, hidden] each
        self._sums = torch.zeros(num_layers, num_layers, dtype=torch.float64)

    def on_layer(self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        if self._cka is not None:
            self._cka.on_layer(layer, batch, entering, leaving)
            return
        self._states.append(self._chosen.of(batch, leaving))

    def on_batch_end(self, batch: Batch) -> None:
        if self._cka is not None:
            self._cka.on_batch_end(batch)
            return
        rows = [each.to(self._states[0].device) for each in self._states]
        states = exact(torch.stack(rows, dim=1))  # [tokens, L, hidden]
        self._sums = self._sums.to(states.device, non_blocking=True)
        if self._metric == "cosine":
            states = torch.nn.functional.normalize(states, dim=-1)
            self._sums += (states @ states.transpose(1, 2)).sum(dim=0)
        else:
            self._sums -= torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=0)
        self._states = []

    def on_pass_end(self, processes: Processes) -> None:
        if self._cka is not None:
            self._cka.on_pass_end(processes)
        else:
            self._sums = processes.sum(self._sums.cpu())

    def similarity(self) -> torch.Tensor:
        """``[L, L]`` float64: the mean over tokens of the metric ``cosine``.

        The cosine of a layer with itself is 1, so that the diagonal of the sums counts the tokens.
        """
        return self._sums / self._sums.diagonal()

    def choose(self, n: int, removable: Sequence[int]) -> list[int]:
        # All sums are over the same tokens, so they rank like the means.
        similarity = self._sums if self._cka is None else self._cka.result().values
        remaining, removed = list(range(self.num_layers)), list[int]()
        while len(removed) < n:
            can_go = self.staying.following(removed, removable, f"drop {n}")
            pairs = [(i, j) for j in can_go for i in remaining if i < j]
            if pairs:
                later = min(pairs, key=lambda pair: (-float(similarity[pair]), pair))[1]
            else:  # only layer 0 is left to remove, and it is never the later layer of a pair
                later = can_go[0]
            remaining.remove(later)
            removed.append(later)
        return removed


CRITERION = SimilarPairs
