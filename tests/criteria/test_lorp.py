"""LoRP against its description, followed by hand on similarities from plain hidden states and on tables with known clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from calibration_sets import padded_set, plain_set
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_states import states_around
from sklearn.cluster import SpectralClustering
from tiny_models import Tiny, tiny_model

from sglp_llm.calibration import CalibrationSet
from sglp_llm.criteria import SetCriterion, make_criterion
from sglp_llm.criteria.lorp import STATES, clusters_of, number_of_clusters
from sglp_llm.criteria.slp import SimilarPairs
from sglp_llm.engine import PassSettings, run_pass
from sglp_llm.errors import UserError
from sglp_llm.models.loading import wrap_model


def blocks(*sizes: int, inside: float = 0.95, outside: float = 0.1) -> torch.Tensor:
    """Similarities of groups of consecutive layers."""
    depth = sum(sizes)
    table = torch.full((depth, depth), outside, dtype=torch.float64)
    first = 0
    for size in sizes:
        table[first : first + size, first : first + size] = inside
        first += size
    return table.fill_diagonal_(1.0)


def by_hand(table: list[list[float]], clusters: list[set[int]], n: int, eligible: set[int]) -> list[int]:
    """First one layer of each cluster, the most redundant first, then always from the most redundant cluster."""

    def redundancy(layer: int) -> float:
        """In the whole cluster, whatever has gone already."""
        others = [table[layer][other] for each in whole_clusters if layer in each for other in each - {layer}]
        return sum(others) / len(others) if others else -math.inf

    def best(cluster: set[int]) -> int:
        return max(sorted(cluster & eligible), key=redundancy)

    whole_clusters = clusters
    clusters, removed = [set(each) for each in clusters], list[int]()
    order = [each for each in clusters if each & eligible]
    for cluster in sorted(order, key=lambda each: -redundancy(best(each)))[:n]:
        removed.append(best(cluster))
        cluster.discard(removed[-1])
    while len(removed) < n:

        def whole(cluster: set[int]) -> float:
            pairs = [table[i][j] for i in cluster for j in cluster if i != j]
            return sum(pairs) / len(pairs) if pairs else -math.inf

        cluster = max([each for each in clusters if each & eligible], key=whole)
        removed.append(best(cluster))
        cluster.discard(removed[-1])
    return removed


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("calibration", [plain_set(5), padded_set(5, "right")], ids=["plain", "right"])
def test_of_hidden_states_it_is_the_description(family: str, calibration: CalibrationSet, kind: str) -> None:
    model = wrap_model(tiny_model(Tiny(family, 0)))
    depth, states = model.num_layers, states_around(model, calibration)
    table = [[1.0] * depth for _ in range(depth)]
    side = 1 if kind == "leaving" else 0
    for i in range(depth):
        for j in range(depth):
            cosines = [
                float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))
                for sequence in states
                for one, other in zip(sequence[i][side], sequence[j][side], strict=True)
            ]
            table[i][j] = sum(cosines) / len(cosines)
    mean = sum(table[i][j] for i in range(depth) for j in range(depth) if i != j) / (depth * (depth - 1))
    level = -math.log2(mean)
    count = 2 if level >= 1 else 3 if level >= 0.7 else 4
    affinity = [[(value + 1) / 2 for value in row] for row in table]
    labels = SpectralClustering(count, affinity="precomputed", random_state=0).fit_predict(affinity)
    clusters = [{layer for layer in range(depth) if labels[layer] == number} for number in range(count)]
    clusters.sort(key=lambda each: sum(each) / len(each))
    for batch_size in (1, 3):
        criterion = make_criterion("lorp", depth, options={"states": kind})
        assert isinstance(criterion, SetCriterion)
        run_pass(model, calibration, [criterion], PassSettings(batch_size=batch_size))
        for n in range(1, depth - 1):
            found = criterion.choose(n, range(depth))
            assert found == by_hand(table, clusters, n, set(range(1, depth - 1)))


@pytest.mark.parametrize(("value", "count"), [(0.5, 2), (0.6, 3), (0.61, 3), (0.63, 4), (1.0, 4), (0.0, 2), (-0.1, 2)])
def test_more_similar_layers_make_more_clusters(value: float, count: int) -> None:
    assert number_of_clusters(blocks(*[1] * 8, outside=value)) == count


@pytest.mark.parametrize("sizes", [(3, 5), (4, 4, 4), (2, 6, 3, 5)])
def test_clusters_are_found_and_ordered_by_depth(sizes: Sequence[int]) -> None:
    found = clusters_of(blocks(*sizes), len(sizes), 0)
    assert [len(each) for each in found] == list(sizes)
    assert [layer for each in found for layer in each] == list(range(sum(sizes)))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), depth=st.integers(5, 12), data=st.data())
def test_it_takes_what_may_go_and_no_layer_at_the_ends(seed: int, depth: int, data: st.DataObject) -> None:
    points = torch.nn.functional.normalize(
        torch.randn(depth, 4, generator=torch.Generator().manual_seed(seed)).double(), dim=-1
    )
    first = data.draw(st.integers(0, 2))
    removable = range(first, depth - data.draw(st.integers(0, 1)))
    may_go = set(removable) - {0, depth - 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimilarPairs, "similarity", lambda _: points @ points.T)
        criterion = make_criterion("lorp", depth)
        assert isinstance(criterion, SetCriterion)
        for n in range(1, len(may_go) + 1):
            found = criterion.choose(n, removable)
            assert len(set(found)) == n
            assert set(found) <= may_go
            assert found == criterion.choose(n, removable)
        with pytest.raises(UserError, match=f"at most {len(may_go)} can go, not {len(may_go) + 1}"):
            criterion.choose(len(may_go) + 1, removable)


def test_every_cluster_gives_one_before_any_gives_two() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimilarPairs, "similarity", lambda _: blocks(5, 5, inside=0.9, outside=0.05))
        criterion = make_criterion("lorp", 10)
        assert isinstance(criterion, SetCriterion)
        assert {layer // 5 for layer in criterion.choose(2, range(10))} == {0, 1}
