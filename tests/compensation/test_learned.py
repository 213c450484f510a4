"""Refining by gradient. Oracle: plain transformers models, one with the layers skipped, in a loop with torch's own functions."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from calibration_sets import ids_and_mask, labels_of, padded_set, plain_set, sampled_set
from many_processes import in_processes
from tiny_models import Tiny, every_tiny, save_tiny, tiny_model
from torch import Tensor, nn

from sglp_llm import current_processes
from sglp_llm.calibration import CalibrationSet, Parts, split
from sglp_llm.compensation import get_method
from sglp_llm.compensation.learned import Learned, refinable
from sglp_llm.compensation.repair.refine import Refined, Schedule, refine
from sglp_llm.engine.modes import replaced_weights, skipped
from sglp_llm.models import find_source
from sglp_llm.models.loading import DecoderModel, load_model, load_streamed, wrap_model
from sglp_llm.processes import ALONE, Processes

REMOVED = (2, 3, 5)
SCHEDULE = Schedule(epochs=2, sequences=2, rate=1e-3, vector_rate=1e-2, seed=3)
PARTS = Parts(range(5), range(5, 7))


def refined(
    model: DecoderModel,
    calibration: CalibrationSet,
    start: dict[str, Tensor],
    processes: Processes = ALONE,
    removed: tuple[int, ...] = REMOVED,
) -> Refined:
    names = refinable(model, removed)
    return refine(model, calibration, removed, names, start, PARTS, SCHEDULE, processes=processes)


def divergence_and_loss(model: DecoderModel, other: nn.Module, calibration: CalibrationSet, index: int) -> list[Tensor]:
    ids, mask = calibration.input_ids[index], calibration.mask[index]
    with torch.no_grad():
        dense = model.model(**ids_and_mask(ids, mask), use_cache=False).logits[0, mask].log_softmax(-1)
    result = other(**ids_and_mask(ids, mask), labels=labels_of(ids, mask), use_cache=False)
    own = result.logits[0, mask].log_softmax(-1)
    return [nn.functional.kl_div(own, dense, log_target=True, reduction="batchmean"), result.loss]


def by_hand(
    model: DecoderModel, calibration: CalibrationSet, start: dict[str, Tensor], removed: tuple[int, ...]
) -> tuple[dict[str, Tensor], list[float]]:
    """The values after the last step, and the held-out divergence after each epoch."""
    student = wrap_model(deepcopy(model.model).requires_grad_(False).eval())
    names = refinable(model, removed)
    for name, value in start.items():
        student.model.get_parameter(name).data = value.clone()
    values = {name: student.model.get_parameter(name).requires_grad_(True) for name in names}
    rates = [SCHEDULE.rate if value.ndim > 1 else SCHEDULE.vector_rate for value in values.values()]
    optimizer = torch.optim.Adam([{"params": [value]} for value in values.values()], betas=(0.9, 0.95))
    order, done, history = torch.Generator().manual_seed(SCHEDULE.seed), 0, []
    with skipped(student.layers, removed):
        for _ in range(2):
            for index in torch.randperm(3, generator=order).tolist():
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * SCHEDULE.factor(done, 6)
                members = [0, 1] if index == 0 else [2, 3] if index == 1 else [4]
                optimizer.zero_grad()
                for member in members:
                    (divergence_and_loss(model, student.model, calibration, member)[0] / len(members)).backward()
                optimizer.step()
                done += 1
            with torch.no_grad():
                both = [divergence_and_loss(model, student.model, calibration, index)[0] for index in (5, 6)]
            history.append(float(sum(both)) / 2)
    return {name: value.detach() for name, value in values.items()}, history


SETS = pytest.mark.parametrize(
    "calibration", [plain_set(7), padded_set(7, "right"), padded_set(7, "left")], ids=["plain", "right", "left"]
)


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_it_is_the_loop_by_hand(tiny: Tiny) -> None:
    model, calibration = wrap_model(tiny_model(tiny)), plain_set(7)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    check(model, calibration)
    assert all(torch.equal(before[name], value) for name, value in model.model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
@SETS
def test_padding_counts_for_nothing(family: str, calibration: CalibrationSet) -> None:
    check(wrap_model(tiny_model(Tiny(family, 0))), calibration)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_layers_that_go_before_the_first_refined_one_are_gone(family: str) -> None:
    check(wrap_model(tiny_model(Tiny(family, 0))), plain_set(7), (0, 3))


def check(model: DecoderModel, calibration: CalibrationSet, removed: tuple[int, ...] = REMOVED) -> None:
    name = refinable(model, removed)[0]
    start = {name: model.model.get_parameter(name).detach() * 1.1}
    found = refined(model, calibration, start, removed=removed)
    last, history = by_hand(model, calibration, start, removed)
    assert found.held_out_divergences == pytest.approx(history, rel=1e-4)
    assert found.judged_on == Parts(range(2), range(5, 7))  # one step each
    with skipped(model.layers, removed), torch.no_grad():
        for values, quality in ((start, found.before), ({**start, **found.values}, found.after)):
            with replaced_weights(model, values):
                # The teacher is the whole model, with its own weights.
                expected = {
                    part: sum(float(_loss(model, calibration, index)) for index in each) / len(each)
                    for part, each in found.judged_on.items()
                }
            assert {part: each.loss for part, each in quality.items()} == pytest.approx(expected, rel=1e-5)
    if history[1] < min(history[0], found.before["held_out"].divergence):
        for each, value in last.items():
            torch.testing.assert_close(found.values[each], value, rtol=2e-3, atol=2e-5)
    assert found.after["held_out"].divergence == pytest.approx(
        min(*history, found.before["held_out"].divergence), rel=1e-4
    )


def _loss(model: DecoderModel, calibration: CalibrationSet, index: int) -> Tensor:
    return divergence_and_loss(model, model.model, calibration, index)[1]


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_streamed_layers_give_the_same(family: str, on_disk: bool, tmp_path: Path) -> None:
    save_tiny(tiny_model(Tiny(family, 0)), tmp_path / "model")
    source = find_source(tmp_path / "model")
    whole, streamed = load_model(source, "float32"), load_streamed(source, "float32", tmp_path if on_disk else None)
    results = [refined(model, plain_set(7), {}) for model in (whole, streamed)]
    assert results[1].held_out_divergences == pytest.approx(results[0].held_out_divergences, rel=1e-5)
    for name, value in results[0].values.items():
        torch.testing.assert_close(results[1].values[name], value, rtol=1e-3, atol=1e-6)
    assert {parameter.device.type for parameter in streamed.layers.parameters()} == {"meta"}
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


def test_the_guard_keeps_the_closed_form_where_refining_does_not_help() -> None:
    model = wrap_model(tiny_model(Tiny("llama", 0)))
    calibration = sampled_set(model.model, 8)
    wild = Learned(Schedule(epochs=1, sequences=2, rate=10.0, vector_rate=10.0)).run(model, calibration, REMOVED)
    start = get_method("linear").run(model, calibration.first(6), REMOVED)
    assert not wild.report["refined"]["taken"]
    assert set(wild.replaced) == set(start.replaced)
    assert all(torch.equal(wild.replaced[name], value) for name, value in start.replaced.items())
    assert {**wild.report, "method": "linear", "start": None, "refined": None} == {
        **start.report,
        "start": None,
        "refined": None,
    }


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_every_family_comes_closer_to_the_whole_model_on_what_it_has_not_seen(tiny: Tiny) -> None:
    model = wrap_model(tiny_model(tiny))
    calibration = sampled_set(model.model, 24)
    found = Learned(Schedule(epochs=4, sequences=2, rate=3e-3, vector_rate=3e-3)).run(model, calibration, (2, 3))
    refined = found.report["refined"]
    for part in ("fit", "held_out"):
        assert refined["divergences"][part]["with"] < refined["divergences"][part]["without"]
    assert refined["taken"] == all(each["with"] <= each["without"] for each in refined["losses"].values())
    taken = "with" if refined["taken"] else "without"
    with skipped(model.layers, (2, 3)), torch.no_grad(), replaced_weights(model, found.replaced):
        assert refined["sequences"] == {"fit": 6, "held_out": 6}
        for part, members in (("fit", range(6)), ("held_out", split(24, 0.25).held_out)):
            losses = [float(_loss(model, calibration, index)) for index in members]
            assert refined["losses"][part][taken] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    shapes = {name: parameter.shape for name, parameter in model.model.named_parameters()}
    assert all(value.shape == shapes[name] and value.dtype == torch.float32 for name, value in found.replaced.items())


def in_one_process() -> list[float]:
    model = wrap_model(tiny_model(Tiny("llama", 0)))
    found = refined(model, plain_set(7), {}, current_processes())
    return [*found.held_out_divergences, float(sum(value.double().sum() for value in found.values.values()))]


def test_two_processes_take_the_same_steps(tmp_path: Path) -> None:
    assert in_processes(2, tmp_path, in_one_process) == [pytest.approx(in_one_process(), rel=1e-4)] * 2
