"""Least squares over random removals, against numpy on the losses of models that transformers runs without the layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibration_sets import ids_and_mask, labels_of, padded_set, plain_set
from tiny_models import Tiny, tiny_model

from sglp_llm import drop_layers
from sglp_llm.calibration import CalibrationSet
from sglp_llm.criteria import make_criterion
from sglp_llm.criteria.sememe import RandomRemovals
from sglp_llm.errors import UserError
from sglp_llm.models.loading import wrap_model
from sglp_llm.plan import plan_from_indices
from sglp_llm.trials import Trials


def loss_without(layers: frozenset[int], calibration: CalibrationSet) -> float:
    model = tiny_model(Tiny("llama", 0))
    if layers:
        model = drop_layers(model, plan_from_indices(6, sorted(layers)))
    losses = []
    for ids, mask in zip(calibration.input_ids, calibration.mask, strict=True):
        with torch.no_grad():
            labels = labels_of(ids, mask)
            losses.append(float(model(**ids_and_mask(ids, mask), labels=labels, use_cache=False).loss))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("calibration", [plain_set(3), padded_set(3, "left")], ids=["plain", "left"])
@pytest.mark.parametrize("seed", [0, 5])
def test_it_is_least_squares_of_the_loss(calibration: CalibrationSet, seed: int) -> None:
    criterion = make_criterion("sememe", 6, seed, {"removals": 12, "probability": 0.3})
    assert isinstance(criterion, RandomRemovals)
    sets = criterion.sets()
    assert sets == criterion.sets()
    assert len(sets) == 13
    criterion.on_trials(Trials(wrap_model(tiny_model(Tiny("llama", 0))), calibration))
    table = np.array([[1.0, *(float(layer in each) for layer in range(6))] for each in sets])
    losses = np.array([loss_without(each, calibration) for each in sets])
    expected = np.linalg.lstsq(table, losses, rcond=None)[0][1:]
    assert criterion.scores() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-5)


def test_a_layer_that_is_never_removed_has_no_effect() -> None:
    criterion = make_criterion("sememe", 6, 0, {"removals": 1, "probability": 0.2})
    assert isinstance(criterion, RandomRemovals)
    never = set(range(6)) - set().union(*criterion.sets())
    assert never
    criterion.on_trials(Trials(wrap_model(tiny_model(Tiny("llama", 0))), plain_set(2)))
    assert all(abs(criterion.scores()[layer]) < 1e-9 for layer in never)


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_layers_are_in_sets_as_often_as_the_probability_says(probability: float) -> None:
    criterion = make_criterion("sememe", 40, 1, {"removals": 500, "probability": probability})
    assert isinstance(criterion, RandomRemovals)
    share = sum(map(len, criterion.sets()[1:])) / (40 * 500)
    assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / 20000) ** 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"removals": -1}, "removals of sememe must not be negative, not -1"),
        ({"probability": 1}, "probability of sememe must be between 0 and 1"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_criterion("sememe", 6, 0, options)
