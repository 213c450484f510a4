"""Compensation. Oracles: numpy's least squares on states that plain hooks have seen, and plain transformers for losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from calibration_sets import plain_set, sampled_set
from checkpoints import QUICK, SMALL, run_cli
from many_processes import in_processes
from shortened_losses import mean_losses
from tiny_models import Tiny, every_tiny, random_model, save_tiny, tiny_model

from sglp_llm import analyze, current_processes
from sglp_llm.compensation import Compensated, FitSettings, compensation_names, get_method
from sglp_llm.compensation.base import LeastSquares
from sglp_llm.engine.modes import replaced_weights
from sglp_llm.errors import UserError
from sglp_llm.models import find_source
from sglp_llm.models.loading import DecoderModel, load_model, load_streamed, wrap_model
from sglp_llm.models.opened import OpenedModel
from sglp_llm.processes import ALONE, Processes

EVERY_TINY = pytest.mark.parametrize("tiny", every_tiny(), ids=str)
REMOVED = (2, 3, 5)
CLOSED_FORMS = [name for name in compensation_names() if isinstance(get_method(name), LeastSquares)]


def works(name: str, model: DecoderModel) -> bool:
    branch = model.adapter.mlp_branch(model.model.config)
    return name == "scale" or not (branch.is_norm or (name == "refit" and branch.is_stacked))


# What holds for every method and family


def same(found: Compensated, expected: Compensated) -> None:
    assert found.replaced.keys() == expected.replaced.keys()
    for name, value in expected.replaced.items():
        torch.testing.assert_close(found.replaced[name], value, rtol=1e-5, atol=1e-6)
    close(found.report, expected.report)


def close(found: Any, expected: Any) -> None:
    """Plain data, numbers to six digits."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            close(found[key], value)
    elif isinstance(expected, list):
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs)
    else:
        assert found == (pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else expected)


@EVERY_TINY
@pytest.mark.parametrize("padding", [None, "left"])
def test_streamed_layers_give_what_the_whole_model_gives(
    tiny: Tiny, padding: Literal["left"] | None, tmp_path: Path
) -> None:
    plain, scratch = tiny_model(tiny), tmp_path / "scratch"
    folder = save_tiny(plain, tmp_path / "model", max_shard_size="20KB")
    scratch.mkdir()
    calibration = sampled_set(plain, 8, padding)
    whole = load_model(find_source(folder), "float32")
    for name in compensation_names():
        if not works(name, whole):
            continue
        expected = get_method(name).run(whole, calibration, REMOVED, FitSettings(batch_size=3))
        assert json.loads(json.dumps(expected.report)) == expected.report
        for place in (None, scratch):
            streamed = load_streamed(find_source(folder), "float32", place)
            same(get_method(name).run(streamed, calibration, REMOVED, FitSettings(batch_size=3)), expected)
            assert {parameter.device.type for parameter in streamed.layers.parameters()} == {"meta"}
    assert not list(scratch.iterdir())


@EVERY_TINY
def test_what_is_taken_never_raises_the_loss_and_what_is_said_is_so(tiny: Tiny) -> None:
    """Random tokens have nothing that could be restored: most of what is fitted to them is noise, and is left out."""
    model, removed = wrap_model(tiny_model(tiny)), (0, 2, 4, 5)
    calibration = plain_set(8)
    for name in CLOSED_FORMS:
        if not works(name, model):
            continue
        found = get_method(name).run(model, calibration, removed)
        without = mean_losses(model, calibration, removed)
        with replaced_weights(model, found.replaced):
            with_it = mean_losses(model, calibration, removed)
        for part in ("fit", "held_out"):
            assert found.report["losses"][part]["without"] == pytest.approx(without[part], rel=1e-5)
            assert found.report["losses"][part]["with"] == pytest.approx(with_it[part], rel=1e-5)
            assert with_it[part] <= without[part] * (1 + 1e-6)
        front, *cuts = found.report["cuts"]
        assert front == {"start": 0, "stop": 1, "taken": False, "reason": front["reason"]}
        path, last = model.adapter.layers, model.adapter.mlp_branch(model.model.config).last
        taken = {f"{path}.{cut['layer']}.{last}" for cut in cuts if cut["taken"]}
        assert {key.removesuffix(".weight").removesuffix(".bias") for key in found.replaced} == taken
        assert all(value.shape == model.model.get_parameter(key).shape for key, value in found.replaced.items())


def test_what_fits_the_states_and_hurts_the_loss_is_left_out() -> None:
    """Few tokens and many numbers: the error falls, on held-out tokens too, and the loss does not."""
    model = wrap_model(tiny_model(Tiny("gpt2", 0)))
    found = get_method("linear").run(model, plain_set(6), REMOVED)
    for cut in found.report["cuts"]:
        assert cut["errors"]["held_out"]["with"] < 0.7 * cut["errors"]["held_out"]["without"]
        worse = [part for part in ("fit", "held_out") if cut["losses"][part]["with"] > cut["losses"][part]["without"]]
        assert worse
        assert not cut["taken"]
        assert "loss" in cut["reason"]
    assert not found.replaced
    assert found.report["losses"]["fit"]["with"] == found.report["losses"]["fit"]["without"]


def test_a_cut_at_the_front_alone_takes_no_work() -> None:
    model = wrap_model(tiny_model(Tiny("llama", 0)))
    found = get_method("linear").run(model, plain_set(6), (0, 1))
    assert not found.replaced
    assert found.report["losses"] == {}
    (cut,) = found.report["cuts"]
    assert "no layer stands before it" in cut["reason"]


def test_new_values_are_judged_in_the_dtype_in_which_they_are_stored() -> None:
    model = wrap_model(tiny_model(Tiny("mistral", 0)))
    calibration = sampled_set(model.model, 24)
    exact = get_method("linear").run(model, calibration, REMOVED)
    found = get_method("linear").run(model, calibration, REMOVED, FitSettings(stored=lambda name: torch.bfloat16))
    assert found.replaced
    assert {value.dtype for value in found.replaced.values()} == {torch.bfloat16}
    with replaced_weights(model, found.replaced):
        losses = mean_losses(model, calibration, REMOVED)
    assert found.report["losses"]["fit"]["with"] == pytest.approx(losses["fit"], rel=1e-6)
    assert found.report["losses"]["fit"]["with"] != exact.report["losses"]["fit"]["with"]


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_the_stored_dtype_is_that_of_the_files(family: str, tmp_path: Path) -> None:
    model = tiny_model(Tiny(family, 0)).to(torch.bfloat16)
    opened = OpenedModel(save_tiny(model, tmp_path / "model"), dtype="float32")
    decoder = opened.load()
    name = f"{decoder.adapter.layers}.3.{decoder.adapter.mlp_out}"
    assert decoder.model.dtype == torch.float32
    assert opened.stored_dtype(f"{name}.weight" if family != "mixtral" else name) == torch.bfloat16
    assert OpenedModel(model.to(torch.float16)).stored_dtype(name) == torch.float16


def test_states_that_are_not_finite_are_the_users_to_mend() -> None:
    model = tiny_model(Tiny("llama", 0))
    model.get_parameter("model.layers.3.mlp.down_proj.weight").data[0, 0] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        get_method("linear").run(wrap_model(model), plain_set(4), (2, 3))


# Processes, and the way in


def compensated(method: str) -> Compensated:
    model = wrap_model(random_model("llama", **Tiny("llama", 0).settings))
    processes: Processes = current_processes()
    return get_method(method).run(model, sampled_set(model.model, 9, "left"), REMOVED, FitSettings(processes=processes))


def both() -> list[Compensated]:
    return [compensated(name) for name in ("linear", "scale")]


def test_every_number_is_that_of_one_process(tmp_path: Path) -> None:
    assert current_processes() is ALONE
    expected = both()
    for result in in_processes(2, tmp_path, both):
        assert not isinstance(result, Exception), result
        for found, alone in zip(result, expected, strict=True):
            same(found, alone)


def test_an_analysis_fills_the_plan() -> None:
    model = tiny_model(Tiny("opt", 0))
    settings = {"calibration": sampled_set(model, 24), "criterion": "bi", "drop": 2, "protect": {"first": 1}}
    plain = analyze(model, **settings).plan
    assert (plain.replaced, plain.compensation) == ({}, {})
    assert "held_out" not in plain.settings
    plan = analyze(model, compensate="linear", held_out=0.5, **settings).plan
    assert plan.kept == plain.kept
    assert plan.replaced
    assert plan.compensation["method"] == "linear"
    assert plan.compensation["sequences"] == {"fit": 12, "held_out": 12}
    assert (plan.settings["compensate"], plan.settings["held_out"]) == ("linear", 0.5)


@EVERY_TINY
def test_a_norm_behind_the_mlp_takes_no_matrix_and_this_is_said_at_once(tiny: Tiny) -> None:
    model = wrap_model(tiny_model(tiny))
    if works("linear", model):
        get_method("linear").check(model.adapter, model.model.config)
        return
    with pytest.raises(UserError, match="scale works there") as raised:
        analyze(model.model, compensate="linear", calibration=plain_set(4), drop=1)
    assert model.adapter.display_name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_refusals(tmp_path: Path) -> None:
    folder = save_tiny(tiny_model(Tiny("olmo2", 0)), tmp_path / "model")
    for arguments, message in (
        (("--compensate", "linear"), "compensate linear does not work for this OLMo 2 model"),
        (("--compensate", "scal"), "unknown compensation 'scal'; did you mean 'scale'"),
        (("--compensate", "none", "--plan", "x.json"), "--plan already says which layers go: leave out --compensate"),
        (("--compensate", "scale", "--samples", "1"), "give at least 2 samples, not 1"),
    ):
        budget = () if "--plan" in arguments else ("--drop", "1")
        outcome = run_cli("prune", folder, "--output", tmp_path / "out", *SMALL, *budget, *arguments)
        assert outcome.code == 2
        assert message in outcome.error
        assert "Memory" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_analyze_on_the_command_line(tmp_path: Path) -> None:
    folder = save_tiny(tiny_model(Tiny("llama", 0)), tmp_path / "model")
    outcome = run_cli("analyze", folder, *QUICK, "--drop", "2", "--compensate", "scale", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["plan"]["settings"]["compensate"] == "scale"
