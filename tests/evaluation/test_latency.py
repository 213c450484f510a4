"""What is measured for a decode time, at which depths; the verb that uses it. No assertion depends on a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SMALL, run_cli, save_tiny, tiny_model
from tiny_models import logits_of

from sglp_llm import UserError, load_plan, load_recipe, pipeline, replan
from sglp_llm.evaluation import latency
from sglp_llm.evaluation.latency import NEW_TOKENS, ROUNDS, measure_decode
from sglp_llm.models.opened import OpenedModel
from sglp_llm.processes import ALONE
from sglp_llm.records import DecodeTimes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


def test_the_depths_take_turns_and_the_model_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = tiny_model(), []
    before = logits_of(model)

    def watched(decoder: Any, *arguments: Any) -> Any:
        ran.append((decoder.num_layers, decoder.model.config.num_hidden_layers))
        return greedy(decoder, *arguments)

    greedy = latency.greedy
    monkeypatch.setattr(latency, "greedy", watched)
    times = measure_decode(OpenedModel(model))
    assert times.depths == (6, 4, 3)
    assert ran == [(6, 6), (4, 4), (3, 3)] * (1 + ROUNDS)
    assert all(seconds > 0 for seconds in times.seconds)
    assert times.device == "cpu"
    assert torch.equal(logits_of(model), before)


def test_seconds_are_the_median_over_the_rounds_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(
        [99.0, 99.0, 99.0, *(value for turn in (3.0, 1.0, 2.0, 9.0, 2.5) for value in (turn, turn / 2, turn / 3))]
    )

    def timed(*_: Any) -> Any:
        return latency_result(next(clock))

    def latency_result(seconds: float) -> Any:
        from sglp_llm.evaluation.benchmark import Greedy

        return Greedy(torch.zeros(1, 1), 0.0, seconds * (NEW_TOKENS - 1))

    monkeypatch.setattr(latency, "greedy", timed)
    assert measure_decode(OpenedModel(tiny_model())).seconds == pytest.approx((2.5, 1.25, 2.5 / 3))


def test_it_needs_the_whole_model_in_memory(tiny: Path) -> None:
    options = (*SMALL, "--criterion", "bi", "--engine", "streamed", "--target-latency", "0.8x")
    outcome = run_cli("analyze", tiny, *options)
    assert outcome.code == 2
    assert "the streamed engine holds one layer at a time: use --engine resident" in outcome.error


def test_a_process_that_is_not_the_main_one_does_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Second(type(ALONE)):  # type: ignore[misc]
        is_main = False

    monkeypatch.setattr(latency, "greedy", None)
    assert measure_decode(OpenedModel(tiny_model()), processes=Second()).seconds == (0, 0, 0)


def test_the_plan_says_what_was_wanted_and_measured(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = DecodeTimes((6, 4, 3), (0.007, 0.005, 0.004), "cpu")  # 1 ms, and 1 ms a layer
    monkeypatch.setattr(pipeline, "measure_decode", lambda *_: times)
    options = (*SMALL, "--criterion", "bi", "--target-latency", "0.72x", "-o", tmp_path / "out")
    outcome = run_cli("prune", tiny, *options)
    assert outcome.code == 0, outcome
    assert (
        "Decode time       7 ms (6 layers), 5 ms (4 layers), 4 ms (3 layers); 0.72x was wanted, on cpu" in outcome.out
    )
    plan = load_plan(tmp_path / "out")
    assert (len(plan.removed), dict(plan.budget)) == (2, {"target_latency": "0.72x"})
    assert plan.settings["decode_times"] == times.to_dict()
    assert run_cli("prune", tiny, *options, "--overwrite").code == 0  # the recipe that it wrote is one
    refused = run_cli("replan", tmp_path / "out", "--min-drop", 0.1)
    assert "target_latency is measured on the model itself; give a ratio or a number of layers" in refused.error
    fresh = pipeline.analyze(tiny, recipe=load_recipe(tmp_path / "out" / "sglp_recipe.yaml"), drop=3).plan
    assert replan(tmp_path / "out", drop=3) == fresh


@pytest.mark.parametrize("text", ["0.8", "fast", "-1x", "0x", "0ms", "25s"])
def test_what_is_no_time_is_refused(text: str, tiny: Path) -> None:
    with pytest.raises(UserError, match=r"is not a share such as 0\.8x, or a time such as 25ms"):
        pipeline.analyze(tiny, criterion="bi", target_latency=text)
