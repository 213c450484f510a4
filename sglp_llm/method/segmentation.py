"""Fisher optimal segmentation: the exact partition of an ordered sequence into homogeneous segments (Fisher 1958)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglp_llm.records import Segment, SimilarityMatrix

FEATURES = ("column_sum", "rows")

_PAPER_MOST = 6
_PAPER_DROP = 0.05


@dataclass(frozen=True)
class FisherPartitions:
    """The best partitions of one sequence, for every number of segments.

    Attributes:
        losses: ``losses[k - 1]`` is the minimal sum of diameters with k segments; non-increasing, the last one is 0.
        starts: ``starts[k - 1][j]`` is where the last of k segments starts when the first j elements are partitioned.
    """

    losses: tuple[float, ...]
    starts: tuple[tuple[int, ...], ...]

    def segments(self, k: int) -> tuple[Segment, ...]:
        """The best partition into k segments, front to back; ties go to the partition whose last cuts are furthest left."""
        stop, segments = len(self.losses), []
        for count in range(k, 0, -1):
            start = self.starts[count - 1][stop]
            segments.append(Segment(start, stop))
            stop = start
        return tuple(reversed(segments))

    def auto_k(self, min_drop: float) -> int:
        """The smallest k for which one more segment reduces the loss by less than ``min_drop`` times the loss of one segment.

        Our choice: the official code compares with loss(k) and takes the last k that passes, which never stops.
        """
        for k in range(1, len(self.losses)):
            if self.losses[k - 1] - self.losses[k] < min_drop * self.losses[0] or self.losses[0] == 0:
                return k
        return len(self.losses)

    def paper_k(self) -> int:
        """The last k up to 6 at which the loss falls by more than 5 % of the loss with one segment fewer; 1 where none does.

        The rule of the code that the paper's authors have published (arXiv 2410.14720).
        """
        falling = (
            k
            for k in range(2, min(_PAPER_MOST, len(self.losses)) + 1)
            if self.losses[k - 2] - self.losses[k - 1] > _PAPER_DROP * self.losses[k - 2]
        )
        return max(falling, default=1)


def fisher_partitions(sequence: torch.Tensor) -> FisherPartitions:
    """Exact dynamic programming over all numbers of segments at once, O(k L^2) with k = L, vectorised over i and j.

    Args:
        sequence: ``[L]`` or ``[L, features]``. The diameter of ``[i, j)`` is the sum of squared deviations from its mean.
    """
    points = sequence.to(torch.float64).reshape(sequence.shape[0], -1)
    diameters = _diameters(points)
    length = points.shape[0]
    best = diameters[0].clone()  # best[j]: first j elements in one segment
    losses, starts = [float(best[length])], [tuple([0] * (length + 1))]
    infinity = torch.tensor(torch.inf, dtype=torch.float64)
    for _ in range(2, length + 1):
        # candidates[i, j]: the first i elements in one segment fewer, then one segment [i, j)
        candidates = torch.where(diameters.isfinite(), best[:, None] + diameters, infinity)
        best, choice = candidates.min(dim=0)
        losses.append(float(best[length]))
        starts.append(tuple(choice.tolist()))
    return FisherPartitions(tuple(losses), tuple(starts))


def layer_partitions(similarity: SimilarityMatrix, features: str = "column_sum") -> FisherPartitions:
    """The best partitions of the decoder layers, for every number of segments.

    Args:
        similarity: The CKA matrix.
        features: See `segment_layers`.
    """
    values = similarity.values
    return fisher_partitions(values.sum(dim=0) if features == "column_sum" else values)


def segment_layers(
    similarity: SimilarityMatrix,
    k: int | None,
    features: str = "column_sum",
    min_drop: float = 0.05,
    rule: str = "auto",
) -> tuple[Segment, ...]:
    """Cuts the decoder layers into segments of similar representation.

    Args:
        similarity: The CKA matrix.
        k: Number of segments; ``None`` chooses it by ``rule``.
        features: ``"column_sum"``: one number per layer, as in the official code; ``"rows"``: a layer's whole row of CKA.
        min_drop: See `FisherPartitions.auto_k`.
        rule: ``"auto"`` for `FisherPartitions.auto_k`, ``"paper"`` for `FisherPartitions.paper_k`.
    """
    partitions = layer_partitions(similarity, features)
    if k is None:
        k = partitions.paper_k() if rule == "paper" else partitions.auto_k(min_drop)
    return partitions.segments(k)


def _diameters(points: torch.Tensor) -> torch.Tensor:
    """``[L + 1, L + 1]``: the diameter of every ``[i, j)`` with i < j, infinity elsewhere, from prefix sums."""
    length = points.shape[0]
    points = points - points.mean(dim=0)  # otherwise small diameters cancel between large prefix sums
    zero = points.new_zeros(1, points.shape[1])
    sums = torch.cat([zero, points.cumsum(dim=0)])
    squares = torch.cat([zero, points.square().cumsum(dim=0)]).sum(dim=1)
    start, stop = torch.meshgrid(torch.arange(length + 1), torch.arange(length + 1), indexing="ij")
    count = (stop - start).clamp(min=1)
    spread = (squares[None, :] - squares[:, None]) - (sums[None, :] - sums[:, None]).square().sum(dim=2) / count
    spread = torch.where(count == 1, 0.0, spread.clamp(min=0))
    return torch.where(stop > start, spread, torch.inf)
