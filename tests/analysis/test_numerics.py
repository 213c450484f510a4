"""Numbers that are not finite, layers that are alike, and sizes at the edge: with every criterion of the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_sets import plain_set
from checkpoints import run_cli, save_tiny, tiny_model
from helpers import TEXT
from transformers import AutoModelForCausalLM, PreTrainedModel

from sglp_llm import PrunePlan, analyze, prune
from sglp_llm.criteria import ScoreCriterion, SetCriterion, criterion_names, get_criterion
from sglp_llm.errors import UserError

CRITERIA = criterion_names()
SCORES = [name for name in CRITERIA if issubclass(get_criterion(name), ScoreCriterion)]
DOWN = "model.layers.{}.mlp.down_proj.weight"


def plan_of(model: PreTrainedModel, criterion: str, sequences: int = 4, **settings: Any) -> PrunePlan:
    settings = {"drop": 2, **settings}
    return analyze(model, calibration=plain_set(sequences), criterion=criterion, **settings).plan


def changed(model: PreTrainedModel, name: str, change: Any) -> PreTrainedModel:
    with torch.no_grad():
        change(model.get_parameter(name))
    return model


def passing_on(model: PreTrainedModel) -> PreTrainedModel:
    """Every layer has the first one's weights, and adds nothing to its input."""
    with torch.no_grad():
        first = dict(model.model.layers[0].named_parameters())
        for layer in model.model.layers:
            for name, parameter in layer.named_parameters():
                parameter.copy_(0 * parameter if "o_proj" in name or "down_proj" in name else first[name])
    return model


def overflowing(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """In float16 the weights are finite, and what leaves the layer is not."""

    def grow(weight: torch.Tensor) -> None:
        weight.mul_(60_000 / weight.abs().max())

    for name in ("up_proj", "gate_proj", "down_proj"):
        changed(model, f"model.layers.{layer}.mlp.{name}.weight", grow)
    return model.half()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite(value: float, criterion: str) -> None:
    model = changed(tiny_model(), DOWN.format(3), lambda weight: weight[1, 2].fill_(value))
    with pytest.raises(
        UserError, match=rf"tensor '{DOWN.format(3)}' of decoder layer 3 holds numbers that are not finite"
    ):
        plan_of(model, criterion)


@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_damaged_files_are_found_before_anything_is_written(engine: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    for name, place in ((DOWN.format(3), "of decoder layer 3"), ("model.norm.weight", "outside the decoder layers")):
        model = AutoModelForCausalLM.from_pretrained(source)
        changed(model, name, lambda weight: weight.view(-1)[0].fill_(float("inf"))).save_pretrained(source)
        ended = run_cli("prune", source, "-o", tmp_path / "new" / "out", "--plan", "1", "--engine", engine)
        assert ended.code == 2
        assert f"{source}: tensor {name!r} {place} holds numbers that are not finite" in ended.error
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        save_tiny(source)


def test_weights_that_a_smaller_dtype_cannot_hold(tmp_path: Path) -> None:
    model = changed(tiny_model(), DOWN.format(2), lambda weight: weight[0].fill_(1e5))
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=r"decoder layer 2 .* or float16 is too small for them \(try --dtype float32\)"):
        prune(
            tmp_path / "source", tmp_path / "out", drop=1, criterion="random", calibration=plain_set(2), dtype="float16"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert analyze(tmp_path / "source", drop=1, criterion="random", calibration=plain_set(2)).plan.removed


@pytest.mark.parametrize("criterion", CRITERIA)
def test_activations_that_overflow(criterion: str, tmp_path: Path) -> None:
    """A criterion that looks at no hidden states chooses, and the reference of the reload check is refused."""
    overflowing(tiny_model(), 2).save_pretrained(tmp_path / "source")
    settings: dict[str, Any] = {"dtype": "float16", "protect": {"first": 3}}
    with pytest.raises(
        UserError, match=r"(decoder )?layer 2 .*(not finite|is not)|score of decoder layer 2 is not finite"
    ):
        prune(tmp_path / "source", tmp_path / "out", criterion=criterion, drop=1, calibration=plain_set(4), **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_layers_that_are_alike_and_do_nothing(criterion: str) -> None:
    plan = plan_of(passing_on(tiny_model()), criterion)
    assert len(plan.removed) == 2
    if criterion in SCORES and criterion not in ("random", "reverse"):
        scores = plan.scores[criterion]
        assert max(scores) == pytest.approx(min(scores), rel=1e-5, abs=1e-6)
        if len(set(scores)) == 1:
            assert plan.removed == (0, 1)


def test_ties_go_to_the_lower_index() -> None:
    tied = [name for name in SCORES if len(set(plan_of(passing_on(tiny_model()), name).scores[name])) == 1]
    assert {"magnitude", "bi", "ppl"} <= set(tied)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_two_layers_and_one(criterion: str) -> None:
    assert len(plan_of(tiny_model(num_hidden_layers=2), criterion, drop=1).removed) == 1
    assert len(plan_of(tiny_model(num_hidden_layers=2), criterion, drop=None, ratio=0.5).kept) == 1
    with pytest.raises(UserError, match="at most 0 can go"):
        plan_of(tiny_model(num_hidden_layers=1), criterion, drop=1)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_layer_is_left(criterion: str) -> None:
    most = 4 if criterion == "lorp" else 5
    plan = plan_of(tiny_model(), criterion, drop=None, ratio=most / 6)
    assert len(plan.removed) == most


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_calibration_sequence(criterion: str) -> None:
    assert len(plan_of(tiny_model(), criterion, sequences=1).removed) == 2


@pytest.mark.parametrize(("vocabulary", "code"), [(280, 2), (300, 0), (512, 0)])
def test_a_vocabulary_of_another_size_than_the_tokenizer(vocabulary: int, code: int, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", vocab_size=vocabulary)
    options = ("--calibration", TEXT, "--samples", 2, "--seq-len", 16)
    ended = run_cli("prune", source, "-o", tmp_path / "out", "--criterion", "bi", "--drop", 1, *options)
    assert ended.code == code, ended
    assert (tmp_path / "out").exists() == (code == 0)
    if code:
        assert "the tokenizer does not belong to the model" in ended.error


def test_a_tokenizer_without_bos_and_pad(tmp_path: Path) -> None:
    from helpers import tiny_tokenizer

    source = save_tiny(tmp_path / "source")
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(source)
    options = ("--calibration", TEXT, "--samples", 1, "--seq-len", 16)
    for criterion in ("bi", "search"):
        ended = run_cli("prune", source, "-o", tmp_path / criterion, "--criterion", criterion, "--drop", 1, *options)
        assert ended.code == 0, ended


def test_the_registry_has_no_other_kinds() -> None:
    assert all(issubclass(get_criterion(name), ScoreCriterion | SetCriterion) for name in CRITERIA)
