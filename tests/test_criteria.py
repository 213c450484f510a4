"""The criteria of other papers against plain loops over states and gradients that plain hooks and autograd give."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from calibration_sets import ids_and_mask, padded_set, plain_set
from layer_states import cka_by_hand, states_around
from tiny_models import Tiny, tiny_model

from sglp_llm import analyze
from sglp_llm.calibration import CalibrationSet
from sglp_llm.criteria import SetCriterion, criterion_names, get_criterion, make_criterion
from sglp_llm.criteria.base import ScoreCriterion
from sglp_llm.engine.resident import run_pass
from sglp_llm.loading import DecoderModel, wrap_model

FAMILIES = pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
SETS = pytest.mark.parametrize(
    "calibration", [plain_set(5), padded_set(5, "right"), padded_set(5, "left")], ids=["plain", "right", "left"]
)


def wrapped(family: str) -> DecoderModel:
    return wrap_model(tiny_model(Tiny(family, 0)))


def chosen(
    model: DecoderModel, calibration: CalibrationSet, name: str, n: int, batch_size: int, **options: str
) -> list[int]:
    criterion = make_criterion(name, model.num_layers, options=options)
    assert isinstance(criterion, SetCriterion)
    run_pass(model, calibration, [criterion], batch_size=batch_size)
    return criterion.choose(n, range(model.num_layers))


@FAMILIES
@SETS
@pytest.mark.parametrize("accumulator", ["device", "host"])
def test_taylor_is_the_sum_over_elements_of_weight_times_summed_gradient(
    family: str, calibration: CalibrationSet, accumulator: str
) -> None:
    model = wrapped(family)
    model.model.zero_grad()
    for ids, mask in zip(calibration.input_ids, calibration.mask, strict=True):
        # The first real token has nothing real in front of it to be predicted from.
        labels = ids.masked_fill(~mask | ~torch.cat([mask[:1], mask[:-1]]), -100)[None]
        model.model(**ids_and_mask(ids, mask), labels=labels, use_cache=False).loss.backward()
    expected = []
    for layer in model.layers:
        matrices = [p for p in layer.parameters() if p.ndim >= 2 and p.grad is not None]
        expected.append(sum(float((p.detach().double() * p.grad.double()).abs().sum()) for p in matrices))
    model.model.zero_grad()
    criterion = make_criterion("taylor", model.num_layers, options={"accumulator": accumulator})
    assert isinstance(criterion, ScoreCriterion)
    run_pass(model, calibration, [criterion])
    assert criterion.scores() == pytest.approx(expected, rel=1e-4)


@FAMILIES
@SETS
@pytest.mark.parametrize("tokens", ["last", "all"])
def test_angular_is_the_least_mean_angle_of_contiguous_layers(
    family: str, calibration: CalibrationSet, tokens: str
) -> None:
    model = wrapped(family)
    states = states_around(model, calibration)
    for n in (1, 2, 4):
        distances = []
        for start in range(model.num_layers - n + 1):
            angles = []
            for sequence in states:
                pairs = list(zip(sequence[start][0], sequence[start + n - 1][1], strict=True))
                for before, after in pairs if tokens == "all" else pairs[-1:]:
                    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=0)
                    angles.append(math.acos(max(-1.0, min(1.0, float(cosine)))) / math.pi)
            distances.append(sum(angles) / len(angles))
        first = distances.index(min(distances))
        for batch_size in (1, 3):
            found = chosen(model, calibration, "angular", n, batch_size, tokens=tokens)
            assert found == list(range(first, first + n))


@FAMILIES
@SETS
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "cka"])
def test_slp_removes_the_later_layer_of_the_most_similar_pair(
    family: str, calibration: CalibrationSet, metric: str
) -> None:
    model = wrapped(family)
    states = states_around(model, calibration)
    depth = model.num_layers
    if metric == "cka":
        table = cka_by_hand(states, "cosine", 8, 64)
        similarity = {pair: float(table[pair]) for pair in combinations(range(depth), 2)}
    else:
        similarity = {}
        for i, j in combinations(range(depth), 2):
            values = []
            for sequence in states:
                for one, other in zip(sequence[i][1].double(), sequence[j][1].double(), strict=True):
                    cosine = float(one @ other / (one.norm() * other.norm()))
                    values.append(cosine if metric == "cosine" else -float((one - other).norm()))
            similarity[i, j] = sum(values) / len(values)
    remaining, removed = set(range(depth)), []
    for _ in range(3):
        pairs = [pair for pair in similarity if set(pair) <= remaining]
        removed.append(max(pairs, key=lambda pair: similarity[pair])[1])
        remaining.remove(removed[-1])
    for batch_size in (1, 3):
        assert chosen(model, calibration, "slp", 3, batch_size, metric=metric) == removed


def test_sets_respect_what_may_go() -> None:
    model, calibration = wrapped("llama"), plain_set(3)
    for name in ("angular", "slp"):
        criterion = make_criterion(name, model.num_layers)
        assert isinstance(criterion, SetCriterion)
        run_pass(model, calibration, [criterion])
        for n in (1, 2, 3):
            found = criterion.choose(n, range(2, 5))
            assert len(set(found)) == n
            assert set(found) <= {2, 3, 4}


@pytest.mark.parametrize("name", [name for name in criterion_names() if not name.startswith("_")])
def test_every_criterion_makes_a_plan(name: str) -> None:
    model, calibration = tiny_model(Tiny("llama", 0)), plain_set(4)
    plan = analyze(model, calibration=calibration, criterion=name, drop=2, protect={"first": 1, "last": 1}).plan
    assert len(plan.removed) == 2
    assert {0, 5}.isdisjoint(plan.removed)
    fewest = analyze(model, calibration=calibration, criterion=name, target_params=plan_parameters(model, 2)).plan
    assert len(fewest.removed) == 2
    if issubclass(get_criterion(name), ScoreCriterion):
        assert len(plan.scores[name]) == 6
        segmented = analyze(model, calibration=calibration, criterion=name, drop=2, segments=True, num_segments=3).plan
        assert len(segmented.segments) == 3
        for segment in segmented.segments:
            assert set(segment.layers) & set(segmented.kept)


def plan_parameters(model: torch.nn.Module, removed: int) -> int:
    """Parameters that are left when that many layers (all alike) are gone."""
    layer = sum(p.numel() for p in wrap_model(model).layers[0].parameters())  # type: ignore[arg-type]
    return sum(p.numel() for p in model.parameters()) - removed * layer


def test_all_hidden_state_and_gradient_criteria_share_one_pass() -> None:
    model, calibration = wrapped("llama"), plain_set(4)
    calls = []
    handle = model.model.register_forward_hook(lambda *_: calls.append(1))
    analyze(
        model.model,
        calibration=calibration,
        criterion="sglp",
        also=["taylor", "bi", "angular", "slp", "magnitude"],
        drop=2,
    )
    handle.remove()
    assert len(calls) == 4
