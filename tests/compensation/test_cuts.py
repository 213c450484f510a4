"""Cuts repaired in closed form, against numpy's least squares on states that plain hooks have seen, in a straight line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from calibration_sets import sampled_set
from layer_states import states_around
from shortened_losses import mean_losses
from tiny_models import Tiny, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from sglp_llm.calibration import CalibrationSet, split
from sglp_llm.compensation import FitSettings, get_method
from sglp_llm.compensation.base import LeastSquares
from sglp_llm.compensation.repair.cuts import Target, cuts_of
from sglp_llm.compensation.scale import ONE_FACTOR
from sglp_llm.engine.modes import replaced_weights, skipped
from sglp_llm.method.least_squares import RIDGES
from sglp_llm.models.loading import DecoderModel, wrap_model
from sglp_llm.records import Segment

REMOVED = (2, 3, 5)


def method(name: str, target: Target = "dense") -> LeastSquares:
    found = get_method(name)
    assert isinstance(found, LeastSquares)
    return replace(found, target=target)


@contextmanager
def passed(model: DecoderModel, cuts: list[Segment]) -> Iterator[None]:
    with skipped(model.layers, [layer for cut in cuts for layer in cut.layers]):
        yield


def stacked_states(
    name: str, model: DecoderModel, calibration: CalibrationSet, layer: int, behind: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """By sequence: what the branch of a layer gives, what leaves the layer, and what leaves the layer before ``behind``.

    For ``refit`` the first is what the branch's last linear gets.
    """
    branch, given = model.adapter.mlp_branch(model.model.config), []
    watched = model.layers[layer].get_submodule(branch.last if name == "refit" else branch.output)

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen = args[0] if name == "refit" else output
        given.append(seen.reshape(-1, seen.shape[-1]))

    handle = watched.register_forward_hook(keep)
    around = states_around(model, calibration)
    handle.remove()
    real = [part[mask].double().numpy() for part, mask in zip(given, calibration.mask, strict=True)]
    return (
        real,
        [sequence[layer][1].double().numpy() for sequence in around],
        [sequence[behind - 1][1].double().numpy() for sequence in around],
    )


def solved(name: str, part: np.ndarray, whole: np.ndarray, target: np.ndarray, ridge: float) -> np.ndarray:
    """T by the stacked weighted system ``[sqrt(w) M; sqrt(lambda) I]``, one channel alone for ``scale``.

    For ``refit`` M are the inputs of the last linear, and the result is what is added to its matrix.
    """
    root = 1 / np.linalg.norm(target, axis=1, keepdims=True)
    if name == "refit":
        left = root * part
        penalty = np.sqrt(ridge * np.mean(np.sum(left**2, axis=0)))
        nothing = np.zeros((part.shape[1], target.shape[1]))
        stacked = np.vstack([left, penalty * np.eye(part.shape[1])])
        return np.linalg.lstsq(stacked, np.vstack([root * (target - whole), nothing]), rcond=None)[0]
    left, right, eye = root * part, root * (target - whole + part), np.eye(part.shape[1])
    penalty = np.sqrt(ridge * np.mean(np.sum(left**2, axis=0)))
    if name == "linear":
        return np.linalg.lstsq(np.vstack([left, penalty * eye]), np.vstack([right, penalty * eye]), rcond=None)[0]
    return np.diag((np.sum(left * right, axis=0) + penalty**2) / (np.sum(left * left, axis=0) + penalty**2))


def relative_error(name: str, part: np.ndarray, whole: np.ndarray, target: np.ndarray, factor: np.ndarray) -> float:
    missing = whole - (0 if name == "refit" else part) + part @ factor - target
    return float(np.mean(np.sum(missing**2, axis=1) / np.sum(target**2, axis=1)))


def fold_by_hand(
    name: str, layer: nn.Module, path: str, factor: torch.Tensor, offset: float
) -> dict[str, torch.Tensor]:
    """New values by parameter name, for each kind of thing that can stand at ``path``."""
    owner: Any = layer
    for part in path.split("."):
        owner = getattr(owner, part)
    if name == "refit":
        return {f"{path}.weight": owner.weight.double() + (factor if isinstance(owner, Conv1D) else factor.T)}
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
            rows = [list(column) for column in stacked_states(name, student, calibration, layer, cut.stop)]
        if target == "dense":
            rows[2] = stacked_states(name, model, calibration, layer, cut.stop)[2]
        fit, held_out = ([np.concatenate([column[i] for i in part]) for column in rows] for _, part in parts.items())
        width = fit[0].shape[1]
        found: dict[float | None, np.ndarray] = {
            None: np.zeros((width, fit[2].shape[1])) if name == "refit" else np.eye(width)
        }
        found |= {ridge: solved(name, *fit, ridge) for ridge in RIDGES}
        errors = {ridge: relative_error(name, *held_out, factor) for ridge, factor in found.items()}
        ridge = min(errors, key=lambda each: errors[each])
        path = f"{model.adapter.layers}.{layer}."
        new = {
            path + key: value.detach().float()
            for key, value in fold_by_hand(
                name, student.layers[layer], branch.last, torch.from_numpy(found[ridge]), branch.offset
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
        (Tiny("llama", 1), "refit", "dense"),
        (Tiny("gpt2", 0), "refit", "local"),
        (Tiny("opt", 0), "refit", "dense"),
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
    found = method(name, target).run(model, calibration, REMOVED, FitSettings(batch_size=5))
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


def test_losses_in_bfloat16_leave_the_fit_as_it_is() -> None:
    calibration = sampled_set(tiny_model(Tiny("llama", 0)), 12)
    found = {}
    for rounded in (False, True):
        settings = FitSettings(bfloat16=rounded)
        found[rounded] = method("linear").run(wrap_model(tiny_model(Tiny("llama", 0))), calibration, REMOVED, settings)
    exact, rounded_report = (found[each].report for each in (False, True))
    for ours, theirs in zip(rounded_report["cuts"][:1], exact["cuts"][:1], strict=True):
        assert (ours["ridge"], ours["errors"]) == (theirs["ridge"], theirs["errors"])
    for part, losses in exact["losses"].items():
        for name, loss in losses.items():
            assert rounded_report["losses"][part][name] == pytest.approx(loss, rel=1e-2)
            assert rounded_report["losses"][part][name] != loss
    assert found[True].replaced.keys() == found[False].replaced.keys()
    for name, tensor in found[False].replaced.items():
        assert torch.equal(found[True].replaced[name], tensor), name
