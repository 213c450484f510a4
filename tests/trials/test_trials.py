"""Trials against the naive loop: the layer passed through, the whole model run again, plain transformers' own loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from calibration_sets import padded_set, plain_set
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_states import cka_by_hand, states_around
from tiny_models import Tiny, every_tiny, passed_through, tiny_model
from trial_oracles import mean_divergence, mean_loss, wrapped

from sglp_llm.calibration import CalibrationSet
from sglp_llm.criteria import GreedyCriterion, get_criterion, make_criterion
from sglp_llm.engine.replay import Replay
from sglp_llm.models.loading import DecoderModel, wrap_model
from sglp_llm.trials import Trials
from sglp_llm.trials.measures import KLMeasure, LossMeasure

FAMILIES = pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral", "gemma3_text"])
SETS = pytest.mark.parametrize("calibration", [plain_set(3), padded_set(3, "right")], ids=["plain", "padded"])


def output_similarity(model: DecoderModel, calibration: CalibrationSet, removed: tuple[int, ...], tried: int) -> float:
    """CKA of the last layer's output with and without the tried layer, both behind the removed ones."""
    outputs = []
    for without in (removed, (*removed, tried)):
        with passed_through(model.layers, without, model.model):
            outputs.append(states_around(model, calibration))
    pairs = [[one[-1], other[-1]] for one, other in zip(*outputs, strict=True)]
    return float(cka_by_hand(pairs, "cosine", 8, 64)[0, 1])


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
@SETS
def test_replaying_every_layer_is_the_model_bit_for_bit(tiny: Tiny, calibration: CalibrationSet) -> None:
    model = wrap_model(tiny_model(tiny))
    ids, mask = calibration.input_ids, None if calibration.mask.all() else calibration.mask
    with torch.no_grad():
        expected = model.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        replay = Replay(model, ids, mask)
        assert torch.equal(replay.logits(replay.layers(0, frozenset(), replay.first_states)), expected)
        without = replay.logits(replay.layers(0, frozenset({1, 2}), replay.first_states))
        with passed_through(model.layers, (1, 2), model.model):
            shorter = model.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(without, shorter)
        assert not torch.equal(without, expected)
        assert torch.equal(model.model(input_ids=ids, attention_mask=mask, use_cache=False).logits, expected)


@pytest.mark.parametrize("tiny", [Tiny(family, 0) for family in ("llama", "gpt2", "gemma3_text")], ids=str)
def test_in_bfloat16_a_trial_is_the_shortened_model_under_autocast(tiny: Tiny) -> None:
    plain, calibration = tiny_model(tiny), plain_set(2)
    measure, exact = LossMeasure(), LossMeasure()
    removed = frozenset({1, 2})
    Trials(wrap_model(plain), calibration, bfloat16=True).run([removed], measure)
    Trials(wrap_model(plain), calibration).run([removed], exact)
    model = wrap_model(plain)
    ids, losses = calibration.input_ids, []
    with torch.no_grad(), passed_through(model.layers, removed, plain):
        for row in ids:
            with torch.autocast("cpu", torch.bfloat16):
                logits = plain(input_ids=row[None], use_cache=False).logits
            assert logits.dtype == torch.bfloat16
            losses.append(float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), row[1:])))
    assert measure.means()[removed] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert measure.means()[removed] == pytest.approx(exact.means()[removed], rel=1e-2)
    assert measure.means()[removed] != exact.means()[removed]


@FAMILIES
@SETS
def test_ppl_is_the_naive_loop(family: str, calibration: CalibrationSet) -> None:
    model = wrapped(family)
    expected = [math.exp(mean_loss(model, calibration, (layer,))) for layer in range(model.num_layers)]
    for batch_size in (1, 2):
        criterion = make_criterion("ppl", model.num_layers)
        criterion.on_trials(Trials(model, calibration, batch_size))
        assert criterion.scores() == pytest.approx(expected, rel=1e-5)


@FAMILIES
@SETS
@pytest.mark.parametrize("name", ["sleb", "kl", "cka_output"])
def test_greedy_costs_are_the_naive_ones_in_every_round(name: str, family: str, calibration: CalibrationSet) -> None:
    model = wrapped(family)
    criterion = make_criterion(name, model.num_layers)
    assert isinstance(criterion, GreedyCriterion)
    criterion.on_trials(Trials(model, calibration))
    for removed in ((), (3,), (4, 1)):
        candidates = [layer for layer in range(model.num_layers) if layer not in removed]
        naive = {}
        for layer in candidates:
            if name == "sleb":
                naive[layer] = mean_loss(model, calibration, (*removed, layer))
            elif name == "kl":
                naive[layer] = mean_divergence(model, calibration, (*removed, layer))
            else:
                naive[layer] = -output_similarity(model, calibration, removed, layer)
        assert criterion.costs(removed, candidates) == pytest.approx(naive, rel=1e-4 if name == "cka_output" else 1e-5)


@pytest.mark.parametrize("name", ["sleb", "kl"])
def test_greedy_order_is_the_naive_one(name: str) -> None:
    model, calibration = wrapped("llama"), plain_set(3)
    cost = mean_loss if name == "sleb" else mean_divergence
    order: list[int] = []
    while len(order) < 4:
        candidates = [layer for layer in range(1, 6) if layer not in order]
        order.append(min(candidates, key=lambda layer: cost(model, calibration, (*order, layer))))
    criterion = make_criterion(name, model.num_layers)
    assert isinstance(criterion, GreedyCriterion)
    criterion.on_trials(Trials(model, calibration))
    assert criterion.choose(4, range(1, 6)) == order
    assert criterion.choose(2, range(1, 6)) == order[:2]
    assert set(criterion.choose(2, range(3, 6))) <= {3, 4, 5}


def test_cost_is_suffixes_and_heads_only() -> None:
    model, calibration = wrapped("llama"), plain_set(2)
    counts = {"layer": 0, "head": 0}
    make_criterion("ppl", model.num_layers).on_trials(
        Trials(model, calibration)
    )  # looks once at what follows the layers

    def counter(what: str) -> object:
        def hook(*_: object) -> None:
            counts[what] += 1

        return hook

    forwards = [type(layer).forward for layer in model.layers]
    for layer in model.layers:
        layer.self_attn.register_forward_hook(counter("layer"))
    model.model.lm_head.register_forward_hook(counter("head"))
    criterion = make_criterion("ppl", model.num_layers)
    criterion.on_trials(Trials(model, calibration))
    depth = model.num_layers
    assert counts == {"layer": 2 * (depth * (depth - 1) // 2 + depth - 1), "head": 2 * depth}
    assert forwards == [type(layer).forward for layer in model.layers]
    assert not any("forward" in vars(layer) for layer in model.layers)


@FAMILIES
@SETS
def test_any_sets_share_what_they_can(family: str, calibration: CalibrationSet) -> None:
    model = wrapped(family)
    sets = [frozenset(each) for each in ((1, 2), (1, 3), (2,), (0, 1, 2, 5), (1, 2, 4), (), (0, 5))]
    for reference, measure in ((mean_loss, LossMeasure()), (mean_divergence, KLMeasure())):
        Trials(model, calibration, batch_size=2).run(sets, measure)
        expected = {each: reference(model, calibration, tuple(each)) for each in sets}
        assert measure.means() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_first_sequences_alone() -> None:
    model, calibration = wrapped("llama"), plain_set(4)
    measure = LossMeasure()
    Trials(model, calibration).run([frozenset({2})], measure, sequences=range(1, 3))
    part = replace(calibration, input_ids=calibration.input_ids[1:3], mask=calibration.mask[1:3])
    assert measure.means() == pytest.approx({frozenset({2}): mean_loss(model, part, (2,))}, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.frozensets(st.integers(0, 5)), min_size=1, max_size=8, unique=True))
def test_every_edge_of_the_tree_runs_once(sets: list[frozenset[int]]) -> None:
    model, calls = wrapped("llama"), []
    for layer in model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    Trials(model, plain_set(1)).run(sets, LossMeasure())
    edges = {(layer, frozenset(x for x in each if x < layer)) for each in sets for layer in {*range(6)} - each}
    assert len(calls) == len(edges)


def test_a_broken_trial_leaves_the_model_as_it_was() -> None:
    model = wrapped("llama")
    model.model.train()

    class Broken(RuntimeError):
        pass

    def fail(*_: object) -> None:
        raise Broken

    model.layers[3].register_forward_hook(fail)
    with pytest.raises(Broken):
        make_criterion("ppl", 6).on_trials(Trials(model, plain_set(2)))
    assert model.model.training
    assert not any("forward" in vars(layer) for layer in model.layers)


def test_every_trial_criterion_says_so() -> None:
    from sglp_llm.engine import Need

    assert all(get_criterion(name).needs == Need.TRIALS for name in ("ppl", "sleb", "kl", "cka_output"))
