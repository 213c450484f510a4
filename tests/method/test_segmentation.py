"""Fisher's partition against brute force over every partition there is."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglp_llm.method.segmentation import FEATURES, fisher_partitions, segment_layers
from sglp_llm.records import Segment, SimilarityMatrix


def diameter(points: list[list[float]]) -> float:
    means = [sum(column) / len(points) for column in zip(*points, strict=True)]
    return sum((value - mean) ** 2 for point in points for value, mean in zip(point, means, strict=True))


def loss(points: list[list[float]], cuts: tuple[int, ...]) -> float:
    bounds = [0, *cuts, len(points)]
    return sum(diameter(points[start:stop]) for start, stop in pairwise(bounds))


def brute_force(points: list[list[float]], k: int) -> float:
    return min(loss(points, cuts) for cuts in combinations(range(1, len(points)), k - 1))


@st.composite
def sequences(draw: st.DrawFn) -> list[list[float]]:
    length, width = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    number = st.one_of(st.integers(-3, 3).map(float), st.floats(-50, 50))
    return draw(st.lists(st.lists(number, min_size=width, max_size=width), min_size=length, max_size=length))


@settings(max_examples=150, deadline=None)
@given(points=sequences(), offset=st.sampled_from([0.0, 1000.0]))
def test_equals_brute_force_for_every_k(points: list[list[float]], offset: float) -> None:
    partitions = fisher_partitions(torch.tensor(points, dtype=torch.float64) + offset)
    assert len(partitions.losses) == len(points)
    for k in range(1, len(points) + 1):
        segments = partitions.segments(k)
        assert [segments[0].start, *(segment.stop for segment in segments)][-1] == len(points)
        assert all(left.stop == right.start for left, right in pairwise(segments))
        assert len(segments) == k
        assert all(len(segment) >= 1 for segment in segments)
        best = brute_force(points, k)
        assert loss(points, tuple(segment.start for segment in segments[1:])) == pytest.approx(best, rel=1e-9, abs=1e-7)
        assert partitions.losses[k - 1] == pytest.approx(best, rel=1e-9, abs=1e-7)


def test_one_dimensional_input_is_one_feature() -> None:
    values = torch.tensor([1.0, 1.1, 5.0, 5.2, 9.0])
    assert fisher_partitions(values).segments(3) == fisher_partitions(values[:, None]).segments(3)
    assert fisher_partitions(values).segments(3) == (Segment(0, 2), Segment(2, 4), Segment(4, 5))


@settings(max_examples=100, deadline=None)
@given(points=sequences(), min_drop=st.floats(0, 1))
def test_auto_k_is_the_smallest_that_the_rule_allows(points: list[list[float]], min_drop: float) -> None:
    partitions = fisher_partitions(torch.tensor(points, dtype=torch.float64))
    losses = [*partitions.losses, partitions.losses[-1]]
    stops = [k for k in range(1, len(points)) if losses[0] == 0 or losses[k - 1] - losses[k] < min_drop * losses[0]]
    assert partitions.auto_k(min_drop) == min([*stops, len(points)])


@settings(max_examples=100, deadline=None)
@given(points=sequences())
def test_paper_k_is_the_last_fall_of_more_than_a_twentieth(points: list[list[float]]) -> None:
    partitions = fisher_partitions(torch.tensor(points, dtype=torch.float64))
    expected = 1
    for k, (before, loss) in enumerate(pairwise(partitions.losses[:6]), 2):
        if before - loss > 0.05 * before:
            expected = k
    assert partitions.paper_k() == expected


def test_the_rule_chooses_the_number() -> None:
    sums = torch.tensor([0.0, 1, 10, 11], dtype=torch.float64)
    assert fisher_partitions(sums).losses == (101, 1, 0.5, 0)
    similarity = SimilarityMatrix(torch.diag(sums), "cosine")
    assert len(segment_layers(similarity, None, rule="auto")) == 2
    assert len(segment_layers(similarity, None, rule="paper")) == 4
    assert len(segment_layers(similarity, 3, rule="paper")) == 3


def test_features() -> None:
    # Column sums cannot tell layers 0, 1 from 2, 3; whole rows can.
    block = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.float64)
    similarity = SimilarityMatrix(block, "cosine")
    assert segment_layers(similarity, None, "rows") == (Segment(0, 2), Segment(2, 4))
    assert segment_layers(similarity, None, "column_sum") == (Segment(0, 4),)
    assert FEATURES == ("column_sum", "rows")
    assert len(segment_layers(similarity, 3, "column_sum")) == 3
