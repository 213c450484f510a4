"""The criteria of other papers against plain loops over states and gradients that plain hooks and autograd give."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_sets import mean_loss, padded_set, plain_set
from layer_states import cka_by_hand, states_around
from tiny_models import Tiny, every_tiny, load_plain, save_tiny, tiny_model

from sglp_llm import analyze, prune
from sglp_llm.calibration import CalibrationSet
from sglp_llm.criteria import ScoreCriterion, SetCriterion, criterion_names, get_criterion, make_criterion
from sglp_llm.engine import PassSettings, run_pass
from sglp_llm.models import find_source
from sglp_llm.models.loading import DecoderModel, load_model, load_streamed, wrap_model
from sglp_llm.plan import plan_from_indices
from sglp_llm.trials import Trials

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
    run_pass(model, calibration, [criterion], PassSettings(batch_size=batch_size))
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
        mean_loss(model, ids, mask).backward()
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
def test_snip_is_the_sum_over_sequences_of_weight_times_gradient(family: str, calibration: CalibrationSet) -> None:
    model = wrapped(family)
    expected = [0.0] * model.num_layers
    for ids, mask in zip(calibration.input_ids, calibration.mask, strict=True):
        model.model.zero_grad()
        mean_loss(model, ids, mask).backward()
        for number, layer in enumerate(model.layers):
            matrices = [p for p in layer.parameters() if p.ndim >= 2 and p.grad is not None]
            expected[number] += sum(float((p.detach().double() * p.grad.double()).abs().sum()) for p in matrices)
    model.model.zero_grad()
    criterion = make_criterion("snip", model.num_layers)
    assert isinstance(criterion, ScoreCriterion)
    run_pass(model, calibration, [criterion])
    assert criterion.scores() == pytest.approx(expected, rel=1e-4)


@FAMILIES
@SETS
def test_other_gradient_norms_are_those_of_autograd(family: str, calibration: CalibrationSet) -> None:
    model = wrapped(family)
    expected = {name: [0.0] * model.num_layers for name in ("tensors", "relative")}
    for ids, mask in zip(calibration.input_ids, calibration.mask, strict=True):
        loss = mean_loss(model, ids, mask)
        for number, layer in enumerate(model.layers):
            weights = list(layer.parameters())
            gradients = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
            norms = [float(gradient.double().norm()) for gradient in gradients]
            size = math.sqrt(sum(float(weight.detach().double().square().sum()) for weight in weights))
            expected["tensors"][number] += sum(norms) / len(norms) / len(calibration.input_ids)
            expected["relative"][number] += math.hypot(*norms) / size / len(calibration.input_ids)
    for name, values in expected.items():
        criterion = make_criterion("gradnorm", model.num_layers, options={"norm": name})
        assert isinstance(criterion, ScoreCriterion)
        run_pass(model, calibration, [criterion])
        assert criterion.scores() == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
def test_gradnorm_without_is_autograd_on_the_exported_model(family: str, streamed: bool, tmp_path: Path) -> None:
    calibration = padded_set(3, "left")
    folder = save_tiny(tiny_model(Tiny(family, 0)), tmp_path / "whole")
    model = (load_streamed if streamed else load_model)(find_source(folder), "float32")
    expected = []
    for layer in range(model.num_layers):
        prune(folder, tmp_path / str(layer), plan=plan_from_indices(model.num_layers, [layer]), verify=False)
        left = wrap_model(load_plain(tmp_path / str(layer)))
        norms = []
        for ids, mask in zip(calibration.input_ids, calibration.mask, strict=True):
            loss = mean_loss(left, ids, mask)
            gradients = torch.autograd.grad(loss, list(left.layers.parameters()), allow_unused=True)
            norms.append(math.hypot(*(float(each.double().norm()) for each in gradients if each is not None)))
        expected.append(sum(norms) / len(norms))
    for best, sign in (("largest", -1), ("smallest", 1)):
        criterion = make_criterion("gradnorm_without", model.num_layers, options={"best": best})
        assert isinstance(criterion, ScoreCriterion)
        criterion.on_trials(Trials(model, calibration))
        assert [sign * score for score in criterion.scores()] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
@SETS
def test_gate_is_the_taylor_series_of_a_factor_on_what_the_layer_adds(tiny: Tiny, calibration: CalibrationSet) -> None:
    """Gates are put in by hooks, one a layer and position, and autograd says how the loss depends on them."""
    model = wrap_model(tiny_model(tiny))
    depth, length = model.num_layers, calibration.input_ids.shape[1]
    gates = torch.ones(depth, length, 1, requires_grad=True)

    def hook_for(number: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            entering = args[0] if args else kwargs["hidden_states"]
            leaving = output[0] if isinstance(output, tuple) else output
            gated = entering + gates[number] * (leaving - entering)
            return (gated, *output[1:]) if isinstance(output, tuple) else gated

        return hook

    handles = [layer.register_forward_hook(hook_for(n), with_kwargs=True) for n, layer in enumerate(model.layers)]
    expected = {1: [0.0] * depth, 2: [0.0] * depth}
    for ids, mask in zip(calibration.input_ids, calibration.mask, strict=True):
        (slopes,) = torch.autograd.grad(mean_loss(model, ids, mask), gates)
        predicted = int(mask.sum()) - 1
        for number, own in enumerate(slopes[:, mask, 0].tolist()):
            curvatures = [(predicted * slope) ** 2 / predicted for slope in own]
            expected[1][number] += abs(sum(own)) / len(calibration.input_ids)
            expected[2][number] += (sum(curvatures) / 2 - sum(own)) / len(calibration.input_ids)
    for handle in handles:
        handle.remove()
    for order, values in expected.items():
        for company in ((), ("gradnorm",), ("taylor", "bi")):
            others = [make_criterion(name, depth) for name in company]
            criterion = make_criterion("gate", depth, options={"order": order})
            assert isinstance(criterion, ScoreCriterion)
            run_pass(model, calibration, [criterion, *others])
            assert criterion.scores() == pytest.approx(values, rel=1e-3, abs=1e-6)


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
