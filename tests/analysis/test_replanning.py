"""A plan made again from kept scores is the plan of a new analysis, for every criterion that gives scores."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from calibration_sets import plain_set
from tiny_models import random_model
from transformers import PreTrainedModel

from sglp_llm import UserError, analyze, load_plan, replan
from sglp_llm.adapters import get_adapter
from sglp_llm.criteria import ScoreCriterion, criterion_names, get_criterion
from sglp_llm.plan import plan_to_dict, save_plan
from sglp_llm.records import PrunePlan

SCORING = [name for name in criterion_names() if issubclass(get_criterion(name), ScoreCriterion)]
BUDGETS: list[dict[str, Any]] = [{"ratio": ratio} for ratio in (0.1, 0.2, 0.3, 0.5, 0.6)]
CHANGES: list[dict[str, Any]] = [
    {"drop": 2},
    {"num_segments": 2},
    {"num_segments": "auto", "min_drop": 0.001, "drop": 4},
    {"features": "rows", "num_segments": 4},
    {"segments_rule": "paper", "drop": 3},
    {"protect": {"first": 2}, "ratio": 0.3},
    {"segments": False, "ratio": 0.3},
]


@cache
def model() -> PreTrainedModel:
    return random_model("llama", **{**get_adapter("llama").tiny_configs[0], "num_hidden_layers": 10})


def analysed(**settings: Any) -> PrunePlan:
    return analyze(model(), calibration=plain_set(4), **settings).plan


@cache
def paper() -> PrunePlan:
    return analysed(criterion="sglp", also=("bi", "random"), ratio=0.4)


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("criterion", SCORING)
def test_equals_a_new_analysis_at_every_ratio(criterion: str, segments: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"criterion": criterion, "segments": segments, "num_segments": 3}
    save_plan(analysed(**settings, ratio=0.4), tmp_path / "sglp_plan.json")
    for budget in BUDGETS:
        assert replan(tmp_path, **budget) == analysed(**settings, **budget)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_equals_a_new_analysis_with_other_settings(change: dict[str, Any]) -> None:
    budget = {} if "ratio" in change or "drop" in change else {"ratio": 0.4}
    fresh = analysed(criterion="sglp", also=("bi", "random"), **change, **budget)
    found = replan(paper(), **change)
    # An analysis without segments measures no similarity.
    assert replace(found, similarity=None) == replace(fresh, similarity=None, scores={**paper().scores, **fresh.scores})
    assert fresh.similarity in (found.similarity, None)


def test_target_params_needs_no_model() -> None:
    whole = model().num_parameters()
    layer = sum(parameter.numel() for parameter in model().model.layers[0].parameters())
    found = replan(paper(), target_params=whole - 3 * layer)
    assert found == analysed(criterion="sglp", also=("bi", "random"), target_params=whole - 3 * layer)
    assert len(found.removed) == 3


def test_another_criterion_that_was_scored() -> None:
    found, fresh = replan(paper(), criterion="bi", drop=3), analysed(criterion="bi", drop=3)
    assert found.removed == fresh.removed
    assert found.settings["scored_by"] == "bi"
    assert found.segments == fresh.segments
    assert replan(found, criterion="sglp", ratio=0.4).removed == paper().removed


def test_scores_of_another_program() -> None:
    plan = PrunePlan(4, (0,), scores={"mine": (3.0, 1.0, 2.0, 4.0)})
    assert replan(plan, criterion="mine", drop=2).removed == (1, 2)


def test_a_compensation_is_left_out_on_demand_only() -> None:
    plan = analysed(criterion="bi", drop=2, compensate="scale")
    assert plan.compensation
    with pytest.raises(UserError, match=r"scale is fitted to the removed layers on text; .* --drop 3 --output DIR"):
        replan(plan, drop=3)
    assert replan(plan, drop=3, compensate="none") == analysed(criterion="bi", drop=3)


def test_the_plan_itself_is_not_changed() -> None:
    before = plan_to_dict(paper())
    replan(paper(), drop=1)
    assert plan_to_dict(paper()) == before


def old(plan: PrunePlan) -> PrunePlan:
    """The plan as an older version wrote it."""
    return replace(plan, similarity=None, footprint=None)


SOURCE = "LlamaForCausalLM"
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (
        lambda: analysed(criterion="sleb", drop=2),
        {"ratio": 0.3},
        "sleb gives a set for one number of layers, and no scores (the plan has scores of no criterion); analyse again: "
        f"sglp-llm analyze {SOURCE} --criterion sleb --ratio 0.3 --output DIR",
    ),
    (
        paper,
        {"criterion": "taylor", "num_segments": 3, "protect": {"first": 1, "last": 2}},
        "the plan has scores of gradnorm, bi, random, cka_column_sum, and not of taylor; analyse again: "
        f"sglp-llm analyze {SOURCE} --criterion taylor --ratio 0.4 --num-segments 3 --protect-first 1 --protect-last 2 "
        "--output DIR",
    ),
    (
        lambda: analysed(criterion="bi", drop=2),
        {"segments": True},
        "the plan has no CKA matrix, which segments come from; choose without segments, or analyse again: "
        f"sglp-llm analyze {SOURCE} --criterion bi --drop 2 --segments --output DIR",
    ),
    (
        # The matrix in it is of the trial sequences, and of the search's own settings.
        lambda: analysed(criterion="search", also=("gradnorm",), options={"search": {"budget": "2k"}}, drop=2),
        {"criterion": "sglp"},
        "the plan has no CKA matrix, which segments come from",
    ),
    (lambda: old(paper()), {"ratio": 0.3}, "the plan has no CKA matrix, which segments come from"),
    (lambda: old(analysed(criterion="bi", drop=2)), {"target_params": 1}, "does not say how large the layers are"),
    (lambda: PrunePlan(4, (0, 1)), {"drop": 1}, "the plan has scores of no criterion, and not of gradnorm"),
    (lambda: PrunePlan(4, (0, 1), settings={"samples": "x"}), {"drop": 1}, "the plan: samples must be a whole number"),
    (paper, {"drop": 10}, "drop 10 of 10 layers removes 10; at most 9 can go"),
    (paper, {"num_segments": 11}, "11 segments are more than the model's 10 decoder layers"),
    (paper, {"ratio": 0.3, "drop": 2}, "give exactly one of ratio, drop"),
    (paper, {"rato": 0.3}, "unknown setting of replan 'rato'; did you mean 'ratio'?"),
    (paper, {"samples": 8}, "unknown setting of replan 'samples'"),
]


@pytest.mark.parametrize(("plan", "change", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_refused(plan: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        replan(plan(), **change)
    assert message in str(raised.value)


def test_a_plan_of_an_old_version_needs_only_what_it_has(tmp_path: Path) -> None:
    plan = analysed(criterion="bi", drop=2)
    save_plan(old(plan), tmp_path / "plan.json")
    assert replan(load_plan(tmp_path / "plan.json"), drop=3) == old(analysed(criterion="bi", drop=3))
