"""Clusters of layers with similar outputs, and redundant layers spread over them (LoRP, arXiv 2605.27786)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sglp_llm.criteria.base import SetCriterion
from sglp_llm.criteria.slp import SimilarPairs
from sglp_llm.engine import Batch, Need
from sglp_llm.errors import UserError, unknown
from sglp_llm.processes import Processes

STATES = ("leaving", "entering")

_CLUSTERS = ((1.0, 2), (0.7, 3))
"""Least redundancy level and number of clusters; below the last one there are 4."""
_MOST_CLUSTERS = 4


class SpreadOverClusters(SetCriterion):
    """Spectral clusters of the layers' similarities; every cluster gives one layer, then the most redundant ones give more.

    S is the mean over tokens of the cosine between two layers' outputs, and ``-log2`` of its mean off the diagonal says how many
    clusters there are: 2 from 1.0 on, 3 from 0.7 on, otherwise 4. They are spectral clusters of ``(S + 1) / 2``. A layer's
    redundancy is its mean S with the other layers of its cluster, and a cluster's is the mean of its remaining pairs. The first
    and the last layer stay. The authors' public code compares the hidden states that enter the layers instead of their outputs.

    Args:
        num_layers: Number of decoder layers.
        seed: Seed of the clustering.
        states: Which hidden states of a layer are compared: those ``leaving`` it, or those ``entering`` it.
        positions: Evenly spaced positions per sequence.

    Raises:
        UserError: ``states`` is neither.
    """

    needs = Need.HIDDEN_STATES

    def __init__(self, num_layers: int, seed: int = 0, *, states: str = "leaving", positions: int = 64) -> None:
        super().__init__(num_layers, seed)
        if states not in STATES:
            raise unknown("states of lorp", states, STATES)
        self._entering = states == "entering"
        self._pairs = SimilarPairs(num_layers, seed, metric="cosine", positions=positions)

    def on_layer(self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        self._pairs.on_layer(layer, batch, entering, entering if self._entering else leaving)

    def on_batch_end(self, batch: Batch) -> None:
        self._pairs.on_batch_end(batch)

    def on_pass_end(self, processes: Processes) -> None:
        self._pairs.on_pass_end(processes)

    def choose(self, n: int, removable: Sequence[int]) -> list[int]:
        free = [layer for layer in removable if layer not in (0, self.num_layers - 1)]
        if n > len(free):
            raise UserError(f"lorp keeps the first and the last layer: at most {len(free)} can go, not {n}")
        similarity = self._pairs.similarity()
        clusters = [list(each) for each in clusters_of(similarity, number_of_clusters(similarity), self.seed)]
        redundancy = {
            layer: _mean(similarity[layer, [other for other in cluster if other != layer]])
            for cluster in clusters
            for layer in cluster
        }
        removed: list[int] = []
        eligible = set(self.staying.can_follow((), free))

        def most_redundant(cluster: list[int]) -> tuple[float, int]:
            """The redundancy of the cluster's most redundant layer that may go, and minus that layer."""
            return max((redundancy[layer], -layer) for layer in cluster if layer in eligible)

        def take(cluster: list[int]) -> None:
            layer = -most_redundant(cluster)[1]
            cluster.remove(layer)
            removed.append(layer)
            eligible.clear()
            eligible.update(self.staying.can_follow(removed, free))

        giving = [each for each in clusters if eligible & set(each)]
        for cluster in sorted(giving, key=most_redundant, reverse=True)[:n]:
            if eligible & set(cluster):
                take(cluster)
        while len(removed) < n:
            self.staying.following(removed, free, f"drop {n}")
            giving = [each for each in clusters if eligible & set(each)]
            take(max(giving, key=lambda each: _mean(_pairs_in(similarity, each))))
        return removed


def number_of_clusters(similarity: torch.Tensor) -> int:
    """How many clusters LoRP makes of the layers.

    Args:
        similarity: S, ``[L, L]``.
    """
    mean = _mean(_pairs_in(similarity, range(len(similarity))))
    level = -math.log2(mean) if mean > 0 else math.inf
    wanted = next((count for least, count in _CLUSTERS if level >= least), _MOST_CLUSTERS)
    return min(wanted, len(similarity))


def clusters_of(similarity: torch.Tensor, count: int, seed: int) -> list[list[int]]:
    """Spectral clusters (Shi and Malik 2000, as in scikit-learn), ordered by their mean depth.

    Args:
        similarity: S, ``[L, L]``, cosines.
        count: How many.
        seed: Of the k-means in the spectral embedding.
    """
    from sklearn.cluster import SpectralClustering

    affinity = ((similarity + 1) / 2).clamp(0, 1).numpy()
    labels = SpectralClustering(count, affinity="precomputed", random_state=seed).fit_predict(affinity)
    members = [[layer for layer, label in enumerate(labels) if label == number] for number in range(count)]
    return sorted((each for each in members if each), key=lambda each: sum(each) / len(each))


def _pairs_in(similarity: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """S of every pair of different layers."""
    chosen = similarity[list(layers)][:, list(layers)]
    return chosen[~torch.eye(len(chosen), dtype=torch.bool)]


def _mean(values: torch.Tensor) -> float:
    """Less than every similarity where there are none: a layer alone is not redundant."""
    return float(values.mean()) if len(values) else -math.inf


CRITERION = SpreadOverClusters
