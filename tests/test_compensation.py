"""Compensation. Oracles: numpy's least squares on states that plain hooks have seen, and plain transformers for losses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from calibration_sets import ids_and_mask, labels_of, plain_set, sampled_set
from checkpoints import QUICK, run_cli
from layer_states import states_around
from many_processes import in_processes
from tiny_models import Tiny, every_tiny, random_model, save_tiny, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from sglp_llm import analyze, current_processes
from sglp_llm.adapters import Branch
from sglp_llm.calibration import CalibrationSet
from sglp_llm.compensation import Compensated, compensation_names, get_method
from sglp_llm.compensation.base import LeastSquares
from sglp_llm.compensation.scale import ONE_FACTOR
from sglp_llm.engine.branch import branch_outputs, folded
from sglp_llm.engine.cuts import Target, cuts_of
from sglp_llm.engine.modes import replaced_weights, skipped
from sglp_llm.engine.walk import split
from sglp_llm.errors import UserError
from sglp_llm.least_squares import RIDGES
from sglp_llm.loading import DecoderModel, load_model, load_streamed, wrap_model
from sglp_llm.processes import ALONE, Processes
from sglp_llm.records import Segment
from sglp_llm.source import find_source
from sglp_llm.subject import Subject

EVERY_TINY = pytest.mark.parametrize("tiny", every_tiny(), ids=str)
REMOVED = (2, 3, 5)
CLOSED_FORMS = [name for name in compensation_names() if isinstance(get_method(name), LeastSquares)]


def method(name: str, target: Target = "dense") -> LeastSquares:
    found = get_method(name)
    assert isinstance(found, LeastSquares)
    return LeastSquares(name, found.equations, found.is_channelwise, target)


def works(name: str, model: DecoderModel) -> bool:
    return name == "scale" or not model.adapter.mlp_branch(model.model.config).is_norm


def mean_losses(model: DecoderModel, calibration: CalibrationSet, removed: tuple[int, ...]) -> dict[str, float]:
    """Of each part's sequences, by plain transformers on the real tokens alone."""
    losses = []
    with torch.no_grad(), skipped(model.layers, removed):
        for ids, mask in zip(calibration.input_ids, calibration.mask, strict=True):
            labels = labels_of(ids, mask)
            losses.append(float(model.model(**ids_and_mask(ids, mask), labels=labels, use_cache=False).loss))
    parts = split(len(losses), 0.25)
    return {name: float(np.mean([losses[index] for index in part])) for name, part in parts.items()}


# What is folded in


@EVERY_TINY
def test_folding_multiplies_what_the_branch_adds_and_nothing_else(tiny: Tiny) -> None:
    model, calibration = wrap_model(tiny_model(tiny)), plain_set(1)
    branch, layer, path = model.adapter.mlp_branch(model.model.config), model.layers[2], f"{model.adapter.layers}.2."
    generator = torch.Generator().manual_seed(5)
    with branch_outputs(layer, branch) as seen:
        leaving = states_around(model, calibration)[0][2][1].double()
        given = seen[0].reshape(leaving.shape).double()
    width = leaving.shape[1]
    factors = [torch.zeros(width, dtype=torch.float64), torch.randn(width, generator=generator, dtype=torch.float64)]
    if not branch.is_norm:
        factors.append(torch.randn(width, width, generator=generator, dtype=torch.float64))
    for factor in factors:
        tensors = {path + name: value for name, value in folded(layer, branch, factor).items()}
        with replaced_weights(model, tensors):
            found = states_around(model, calibration)[0][2][1].double()
        moved = given @ factor if factor.ndim > 1 else given * factor
        torch.testing.assert_close(found, leaving - given + moved, rtol=1e-4, atol=1e-4)


@EVERY_TINY
def test_the_last_linears_of_both_blocks_are_where_the_adapter_says(tiny: Tiny) -> None:
    model = wrap_model(tiny_model(tiny))
    width = model.model.config.hidden_size
    for path in (model.adapter.mlp_out, model.adapter.attention_out):
        values = folded(model.layers[0], Branch(model.adapter.mlp, path), torch.eye(width, dtype=torch.float64))
        assert values
        for name, value in values.items():
            torch.testing.assert_close(value.float(), model.layers[0].get_parameter(name))


def test_cuts_are_maximal_runs() -> None:
    assert cuts_of((5, 0, 2, 3)) == [Segment(0, 1), Segment(2, 4), Segment(5, 6)]
    assert cuts_of(()) == []


def test_the_last_sequences_are_held_out() -> None:
    assert [(len(split(n, share).fit), len(split(n, share).held_out)) for n, share in TRIED] == [
        (24, 8),
        (1, 1),
        (2, 1),
        (1, 9),
        (9, 1),
    ]


TRIED = ((32, 0.25), (2, 0.25), (3, 0.25), (10, 0.99), (10, 0.01))


# The whole of it, in a straight line


@contextmanager
def passed(model: DecoderModel, cuts: list[Segment]) -> Iterator[None]:
    with skipped(model.layers, [layer for cut in cuts for layer in cut.layers]):
        yield


def stacked_states(
    model: DecoderModel, calibration: CalibrationSet, layer: int, behind: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """By sequence: what the branch of a layer gives, what leaves the layer, and what leaves the layer before ``behind``."""
    branch, given = model.adapter.mlp_branch(model.model.config), []
    handle = (
        model.layers[layer]
        .get_submodule(branch.output)
        .register_forward_hook(lambda module, args, output: given.append(output.reshape(-1, output.shape[-1])))
    )
    around = states_around(model, calibration)
    handle.remove()
    real = [part[mask].double().numpy() for part, mask in zip(given, calibration.mask, strict=True)]
    return (
        real,
        [sequence[layer][1].double().numpy() for sequence in around],
        [sequence[behind - 1][1].double().numpy() for sequence in around],
    )


def solved(name: str, part: np.ndarray, whole: np.ndarray, target: np.ndarray, ridge: float) -> np.ndarray:
    """T by the stacked weighted system ``[sqrt(w) M; sqrt(lambda) I]``, one channel alone for ``scale``."""
    root = 1 / np.linalg.norm(target, axis=1, keepdims=True)
    left, right, eye = root * part, root * (target - whole + part), np.eye(part.shape[1])
    penalty = np.sqrt(ridge * np.mean(np.sum(left**2, axis=0)))
    if name == "linear":
        return np.linalg.lstsq(np.vstack([left, penalty * eye]), np.vstack([right, penalty * eye]), rcond=None)[0]
    return np.diag((np.sum(left * right, axis=0) + penalty**2) / (np.sum(left * left, axis=0) + penalty**2))


def relative_error(part: np.ndarray, whole: np.ndarray, target: np.ndarray, factor: np.ndarray) -> float:
    missing = whole - part + part @ factor - target
    return float(np.mean(np.sum(missing**2, axis=1) / np.sum(target**2, axis=1)))


def fold_by_hand(layer: nn.Module, path: str, factor: torch.Tensor, offset: float) -> dict[str, torch.Tensor]:
    """New values by parameter name, for each kind of thing that can stand at ``path``."""
    owner: Any = layer
    for name in path.split("."):
        owner = getattr(owner, name)
    if isinstance(owner, nn.Parameter):
        return {path: torch.stack([factor.T @ matrix.double() for matrix in owner])}
    weight = owner.weight.double()
    if isinstance(owner, nn.Linear):
        values = {"weight": factor.T @ weight}
    elif isinstance(owner, Conv1D):
        values = {"weight": weight @ factor}
    else:
        values = {"weight": factor.diagonal() * (offset + weight) - offset}
    if getattr(owner, "bias", None) is not None:
        values["bias"] = owner.bias.double() @ factor
    return {f"{path}.{name}": value for name, value in values.items()}


def by_hand(
    model: DecoderModel, calibration: CalibrationSet, removed: tuple[int, ...], name: str, target: Target
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Front to back, every cut with the model as it is by then, each sequence alone, all rows in memory."""
    student = wrap_model(deepcopy(model.model))
    branch, parts = model.adapter.mlp_branch(model.model.config), split(len(calibration.input_ids), 0.25)
    tensors, reports, cuts = {}, [], cuts_of(removed)
    for number, cut in enumerate(cuts):
        layer = cut.start - 1
        with passed(student, cuts[:number]):
            rows = [list(column) for column in stacked_states(student, calibration, layer, cut.stop)]
        if target == "dense":
            rows[2] = stacked_states(model, calibration, layer, cut.stop)[2]
        fit, held_out = ([np.concatenate([column[i] for i in part]) for column in rows] for _, part in parts.items())
        found: dict[float | None, np.ndarray] = {None: np.eye(fit[0].shape[1])}
        found |= {ridge: solved(name, *fit, ridge) for ridge in RIDGES}
        errors = {ridge: relative_error(*held_out, factor) for ridge, factor in found.items()}
        ridge = min(errors, key=lambda each: errors[each])
        path = f"{model.adapter.layers}.{layer}."
        new = {
            path + key: value.detach().float()
            for key, value in fold_by_hand(
                student.layers[layer], branch.last, torch.from_numpy(found[ridge]), branch.offset
            ).items()
        }
        before = mean_losses(student, calibration, removed)
        with replaced_weights(student, new):
            after = mean_losses(student, calibration, removed)
        taken = after["held_out"] < before["held_out"] and after["fit"] <= before["fit"]
        reports.append({"ridge": ridge, "error": errors[ridge], "taken": taken, "before": before, "after": after})
        if taken:
            tensors |= new
            for key, value in new.items():
                student.model.get_parameter(key).data = value
    return tensors, reports


@pytest.mark.parametrize(
    ("tiny", "name", "target"),
    [
        (Tiny("llama", 1), "linear", "dense"),
        (Tiny("llama", 1), "linear", "local"),
        (Tiny("gpt2", 0), "linear", "dense"),
        (Tiny("gpt_neox", 0), "linear", "local"),
        (Tiny("mixtral", 0), "linear", "dense"),
        (Tiny("opt", 0), "linear", "dense"),
        (Tiny("qwen2", 1), "scale", "dense"),
        (Tiny("gemma3_text", 0), "scale", "local"),
        (Tiny("olmo2", 0), "scale", "dense"),
        (Tiny("opt", 1), "scale", "dense"),
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_two_cuts_are_repaired_as_by_a_straight_line_script(
    tiny: Tiny, name: str, target: Target, padding: Literal["left", "right"] | None
) -> None:
    model = wrap_model(tiny_model(tiny))
    calibration = sampled_set(model.model, 24, padding)
    weights = deepcopy(model.model.state_dict())
    expected, cuts = by_hand(model, calibration, REMOVED, name, target)
    found = method(name, target).run(model, calibration, REMOVED, batch_size=5)
    assert expected
    assert found.replaced.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found.replaced[key], value, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found.report["cuts"], cuts, strict=True):
        assert (ours["ridge"], ours["taken"]) == (theirs["ridge"], theirs["taken"])
        assert ours["errors"]["held_out"]["with"] == pytest.approx(theirs["error"], rel=1e-4)
        for part in ("fit", "held_out"):
            assert ours["losses"][part]["without"] == pytest.approx(theirs["before"][part], rel=1e-5)
            assert ours["losses"][part]["with"] == pytest.approx(theirs["after"][part], rel=1e-5)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.model.state_dict().items())


def test_one_factor_for_all_channels_has_one() -> None:
    model = wrap_model(tiny_model(Tiny("gpt2", 0)))
    found = ONE_FACTOR.run(model, sampled_set(model.model, 24), REMOVED)
    assert found.replaced
    for name, tensor in found.replaced.items():
        ratio = tensor / model.model.get_parameter(name)
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


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
        expected = get_method(name).run(whole, calibration, REMOVED, batch_size=3)
        assert json.loads(json.dumps(expected.report)) == expected.report
        for place in (None, scratch):
            streamed = load_streamed(find_source(folder), "float32", place)
            same(get_method(name).run(streamed, calibration, REMOVED, batch_size=3), expected)
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
    found = get_method("linear").run(model, calibration, REMOVED, stored=lambda name: torch.bfloat16)
    assert found.replaced
    assert {value.dtype for value in found.replaced.values()} == {torch.bfloat16}
    with replaced_weights(model, found.replaced):
        losses = mean_losses(model, calibration, REMOVED)
    assert found.report["losses"]["fit"]["with"] == pytest.approx(losses["fit"], rel=1e-6)
    assert found.report["losses"]["fit"]["with"] != exact.report["losses"]["fit"]["with"]


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_the_stored_dtype_is_that_of_the_files(family: str, tmp_path: Path) -> None:
    model = tiny_model(Tiny(family, 0)).to(torch.bfloat16)
    subject = Subject(save_tiny(model, tmp_path / "model"), dtype="float32")
    decoder = subject.load()
    name = f"{decoder.adapter.layers}.3.{decoder.adapter.mlp_out}"
    assert decoder.model.dtype == torch.float32
    assert subject.stored_dtype(f"{name}.weight" if family != "mixtral" else name) == torch.bfloat16
    assert Subject(model.to(torch.float16)).stored_dtype(name) == torch.float16


def test_states_that_are_not_finite_are_the_users_to_mend() -> None:
    model = tiny_model(Tiny("llama", 0))
    model.get_parameter("model.layers.3.mlp.down_proj.weight").data[0, 0] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        get_method("linear").run(wrap_model(model), plain_set(4), (2, 3))


# Processes, and the way in


def compensated(method: str) -> Compensated:
    model = wrap_model(random_model("llama", **Tiny("llama", 0).settings))
    processes: Processes = current_processes()
    return get_method(method).run(model, sampled_set(model.model, 9, "left"), REMOVED, processes=processes)


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
        outcome = run_cli("prune", folder, "--output", tmp_path / "out", *QUICK, *budget, *arguments)
        assert outcome.code == 2
        assert message in outcome.error
        assert "Memory" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_analyze_on_the_command_line(tmp_path: Path) -> None:
    folder = save_tiny(tiny_model(Tiny("llama", 0)), tmp_path / "model")
    outcome = run_cli("analyze", folder, *QUICK, "--drop", "2", "--compensate", "scale", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["plan"]["settings"]["compensate"] == "scale"
