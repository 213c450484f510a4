"""The search against every set of layers, each measured by plain transformers with its layers passed through."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_sets import padded_set, plain_set
from tiny_models import Tiny, random_model, save_tiny, tiny_model
from trial_oracles import mean_divergence, mean_loss, wrapped

from sglp_llm import UserError, analyze
from sglp_llm.calibration import CalibrationSet
from sglp_llm.criteria import make_criterion
from sglp_llm.criteria.search import Search, SearchBudget, parse_budget
from sglp_llm.models.loading import DecoderModel, wrap_model
from sglp_llm.plan import load_plan, plan_to_dict, save_plan
from sglp_llm.trials import Trials

PLENTY: dict[str, Any] = {"budget": "1000k", "proposals": 99, "runs": 9, "beam": 9}
"""Every set is proposed or a swap away, and there is time for all of them."""


def searching(model: DecoderModel, calibration: CalibrationSet, **options: Any) -> Search:
    search = make_criterion("search", model.num_layers, options=options)
    assert isinstance(search, Search)
    search.on_trials(Trials(model, calibration))
    return search


def allowed(search: Search, removable: Iterable[int], n: int) -> list[tuple[int, ...]]:
    """The sets that empty no segment."""
    sets = combinations(removable, n)
    return [each for each in sets if not any(set(segment.layers) <= set(each) for segment in search.segments)]


def rows(calibration: CalibrationSet, part: slice) -> CalibrationSet:
    return replace(calibration, input_ids=calibration.input_ids[part], mask=calibration.mask[part])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("objective", ["kl", "loss"])
@pytest.mark.parametrize("n", [1, 2])
def test_with_time_for_everything_the_best_set_wins(family: str, objective: str, n: int) -> None:
    model, calibration = wrapped(family), plain_set(1)
    search = searching(model, calibration, objective=objective, **PLENTY)
    cost = mean_divergence if objective == "kl" else mean_loss
    removable = range(1, model.num_layers)
    costs = {each: cost(model, calibration, each) for each in allowed(search, removable, n)}
    found = search.finalists(n, removable)
    assert {tuple(sorted(layers)): value for layers, value in found} == pytest.approx(costs, rel=1e-5, abs=1e-7)
    assert tuple(search.choose(n, removable)) == min(costs, key=lambda each: costs[each])
    assert [value for _, value in found] == sorted(value for _, value in found)


@pytest.mark.parametrize("calibration", [plain_set(8), padded_set(8, "right")], ids=["plain", "padded"])
def test_every_cost_in_the_report_is_plain_transformers(calibration: CalibrationSet) -> None:
    model = wrapped("llama")
    search = searching(model, calibration, proposals=8)
    removed = search.choose(2, range(6))
    report = search.report()
    assert report["sequences"] == {"fit": 6, "held_out": 2}
    assert report["winner"]["removed"] == removed
    for each in (report["winner"], report["least_distance"], *report["passed_over"]):
        for name, part in (("cost", slice(6)), ("held_out", slice(6, 8))):
            naive = mean_divergence(model, rows(calibration, part), tuple(each["removed"]))
            assert each[name] == pytest.approx(naive, rel=1e-4, abs=2e-6)
    for stage in report["races"]:
        first = rows(calibration, slice(stage["sequences"]))
        for layers, cost in stage["costs"]:
            assert cost == pytest.approx(mean_divergence(model, first, layers_of(layers)), rel=1e-4, abs=2e-6)


def layers_of(text: str) -> tuple[int, ...]:
    """``1..3 5`` -> 1, 2, 3, 5."""
    ends = [[int(end) for end in part.split("..")] for part in text.split()]
    return tuple(layer for start, *stop in ends for layer in range(start, (stop or [start])[0] + 1))


def test_races_halve_and_the_tokens_are_those_of_the_trials() -> None:
    model, calibration = wrapped("llama"), plain_set(12)
    search = searching(model, calibration, proposals=12, budget="1000k")
    search.choose(2, range(6))
    report, tokens = search.report(), 0
    names = [stage["race"] for stage in report["races"]]
    assert names == sorted(names)  # proposals, then swaps
    assert [stage["sequences"] for stage in report["races"]] == [1, 2, 9] * (len(names) // 3)
    met: set[str] = set()
    for number, stage in enumerate(report["races"]):
        field = [layers for layers, _ in stage["costs"]]
        assert [cost for _, cost in stage["costs"]] == sorted(cost for _, cost in stage["costs"])
        if number % 3 == 0:
            assert met.isdisjoint(field)  # nothing is tried twice
            met |= set(field)
        else:
            before = [layers for layers, _ in report["races"][number - 1]["costs"]]
            assert set(field) == set(before[: max(2, math.ceil(len(before) / 4))])
        new = stage["sequences"] - (0 if number % 3 == 0 else report["races"][number - 1]["sequences"])
        tokens += len(field) * new * 24
    baseline_ran_on = max(s["sequences"] for s in report["races"] if report_name(report) in dict(s["costs"]))
    tokens += (9 - baseline_ran_on) * 24  # what the proposal of least distance had missed
    judged = {tuple(each["removed"]) for each in (report["winner"], report["least_distance"], *report["passed_over"])}
    assert report["tokens"] == tokens + len(judged) * 3 * 24


def report_name(report: Any) -> str:
    by_layers = {layers_of(layers): layers for stage in report["races"] for layers, _ in stage["costs"]}
    return str(by_layers[tuple(report["least_distance"]["removed"])])


@pytest.mark.parametrize("budget", [1, "0.001s"])
def test_a_spent_budget_ends_the_search_after_the_stage(budget: int | str) -> None:
    search = searching(wrapped("llama"), plain_set(8), budget=budget)
    assert len(search.choose(2, range(6))) == 2
    assert [stage["sequences"] for stage in search.trace] == [1]


@pytest.mark.parametrize(("n", "trials"), [(2, 16), (6, 16), (8, 20), (9, 22.5)])
def test_the_budget_without_one_grows_with_the_layers_that_go(n: int, trials: float) -> None:
    settings = {**Tiny("llama", 0).settings, "num_hidden_layers": 24}
    model, calibration = wrap_model(random_model("llama", **settings)), plain_set(8)
    tokens = calibration.input_ids.numel()

    def report(**options: Any) -> Any:
        search = searching(model, calibration, proposals=4, beam=1, **options)  # short stages
        search.choose(n, range(24))
        return search.report()

    assert report() == report(budget=math.ceil(trials * tokens))
    assert (report() == report(budget=16 * tokens)) == (trials == 16)


def test_more_budget_never_ends_with_a_worse_leader() -> None:
    model, calibration = wrapped("llama"), plain_set(8)
    costs = []
    for budget in ("1k", "2k", "4k", "1000k"):
        search = searching(model, calibration, proposals=4, beam=1, budget=budget)
        found = search.finalists(2, range(6))
        if search.trace[-1]["sequences"] == 6 or len(search.trace) > 3:
            costs.append(min(cost for _, cost in found))
    assert len(costs) > 1
    assert costs == sorted(costs, reverse=True)


def test_a_leader_that_loses_on_held_out_sequences_is_not_taken() -> None:
    outcomes = []
    for objective in ("kl", "loss"):
        for family in ("llama", "gpt2", "opt", "mixtral", "gemma3_text"):
            model = wrapped(family)
            for calibration in (plain_set(2), plain_set(3), padded_set(4, "right")):
                search = searching(model, calibration, objective=objective, budget="1000k")
                found = search.finalists(2, range(model.num_layers))
                report = search.report()
                taken, baseline, passed = report["winner"], report["least_distance"], report["passed_over"]
                assert taken["cost"] <= baseline["cost"]
                assert taken["held_out"] <= baseline["held_out"]
                assert all(each["held_out"] > baseline["held_out"] for each in passed)
                assert all(each["cost"] <= taken["cost"] for each in passed)
                assert sorted(found[0][0]) == taken["removed"]
                assert [cost for _, cost in found] == sorted(cost for _, cost in found)
                assert not {layers for layers, _ in found} & {frozenset(each["removed"]) for each in passed}
                outcomes.append(bool(passed))
    assert set(outcomes) == {False, True}


def test_one_sequence_holds_nothing_out_and_says_so() -> None:
    search = searching(wrapped("llama"), plain_set(1))
    search.choose(1, range(6))
    report = search.report()
    assert report["sequences"] == {"fit": 1, "held_out": 0}
    assert report["winner"]["held_out"] is None
    assert report["passed_over"] == []


@pytest.mark.parametrize("n", [1, 2, 3])
def test_only_what_may_go_goes(n: int) -> None:
    search = searching(wrapped("llama"), plain_set(4))
    for removed, _ in search.finalists(n, range(2, 5)):
        assert len(removed) == n
        assert removed <= {2, 3, 4}


def test_a_search_runs_once_for_all_who_ask() -> None:
    model = wrapped("llama")
    search = searching(model, plain_set(4))
    removed, report = search.choose(2, range(6)), search.report()
    model.layers[5].register_forward_hook(lambda *_: pytest.fail("a layer ran again"))
    assert sorted(search.finalists(2, range(6))[0][0]) == removed
    assert search.report() == report


def test_the_plan_holds_the_report_and_survives_the_file(tmp_path: Path) -> None:
    plan = analyze(tiny_model(Tiny("llama", 0)), calibration=plain_set(4), preset="sglp-search", drop=2).plan
    assert plan.settings["criterion"] == plan.settings["scored_by"] == "search"
    assert plan.settings["search"]["winner"]["removed"] == list(plan.removed)
    save_plan(plan, tmp_path / "plan.json")
    assert plan_to_dict(load_plan(tmp_path / "plan.json")) == plan_to_dict(plan)


def test_other_criteria_report_nothing() -> None:
    plan = analyze(tiny_model(Tiny("llama", 0)), calibration=plain_set(4), criterion="bi", also=["search"], drop=2).plan
    assert "search" not in plan.settings


def test_a_preset_changes_the_recipe_and_settings_change_the_preset() -> None:
    model, calibration = tiny_model(Tiny("llama", 0)), plain_set(2)
    plan = analyze(model, calibration=calibration, preset="sglp-search", criterion="reverse", drop=2).plan
    assert plan.removed == (4, 5)
    with pytest.raises(UserError, match="unknown preset 'bset'; did you mean 'best'"):
        analyze(model, calibration=calibration, preset="bset", drop=2)


def test_streamed_layers_give_the_same(tmp_path: Path) -> None:
    folder = save_tiny(tiny_model(Tiny("llama", 0)), tmp_path / "model", max_shard_size="20KB")
    plans = [
        analyze(folder, calibration=plain_set(6), criterion="search", drop=2, engine=engine, batch_size=2).plan
        for engine in ("resident", "streamed")
    ]
    assert plans[0].removed == plans[1].removed
    one, other = (plan.settings["search"] for plan in plans)
    assert one["tokens"] == other["tokens"]
    for first, second in zip(one["races"], other["races"], strict=True):
        assert dict(second["costs"]) == pytest.approx(dict(first["costs"]), rel=1e-4, abs=2e-6)


class Killed(Exception):
    pass


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.8, 1.0])
def test_an_interrupted_search_goes_on_and_ends_with_the_same_plan(share: float, tmp_path: Path) -> None:
    model, calibration = tiny_model(Tiny("llama", 0)), plain_set(8)
    settings: dict[str, Any] = {"calibration": calibration, "preset": "sglp-search", "trial_samples": 8, "drop": 2}
    counted(model, settings, None)  # the first run also looks at what follows the layers
    whole, all_calls = counted(model, settings, None)
    kept = {**settings, "journal": str(tmp_path / "kept")}
    with pytest.raises(Killed):
        counted(model, kept, int(share * all_calls))
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").rglob("*.json")}
    resumed, calls = counted(model, kept, None)
    assert plan_to_dict(resumed) == plan_to_dict(whole)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    if share > 0.1:
        assert len(finished) > 1  # more than the setting
        assert calls < all_calls
    again, least = counted(model, kept, None)
    assert plan_to_dict(again) == plan_to_dict(whole)
    assert least == 6 * 6  # one pass over what is not held out, and no trial


def counted(model: Any, settings: dict[str, Any], die_at: int | None) -> tuple[Any, int]:
    """The plan, and how many layers ran; killed in the given one."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == die_at:
            raise Killed

    handles = [layer.register_forward_hook(count) for layer in model.model.layers]
    try:
        return analyze(model, **settings).plan, calls
    finally:
        for handle in handles:
            handle.remove()


def test_a_journal_serves_another_budget_but_not_other_sequences(tmp_path: Path) -> None:
    model = tiny_model(Tiny("llama", 0))
    settings: dict[str, Any] = {"criterion": "search", "journal": str(tmp_path), "drop": 2}
    analyze(model, calibration=plain_set(4), **settings)
    _, calls = counted(model, {**settings, "calibration": plain_set(4), "options": {"search": {"budget": 1}}}, None)
    assert calls < 6 * 3 + 2 * 6 * 4  # the pass and at most the judgement of two sets
    other = replace(plain_set(4), hash="another")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'trials'} holds") + ".* another calibration_hash"):
        analyze(model, calibration=other, **settings)


def test_a_journal_is_for_criteria_that_keep_trials(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="journal keeps the trials of search; this run has bi: leave it out"):
        analyze(tiny_model(Tiny("llama", 0)), calibration=plain_set(2), criterion="bi", drop=1, journal=str(tmp_path))


def test_predictions_that_are_no_numbers_are_said() -> None:
    model = tiny_model(Tiny("llama", 0))
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)  # the weights and states are finite, the predictions are not
    with pytest.raises(UserError, match="search: the kl of no trial is finite: are the weights damaged"):
        analyze(model, calibration=plain_set(2), criterion="search", drop=1)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (16000, SearchBudget(tokens=16000)),
        ("16000", SearchBudget(tokens=16000)),
        ("16k", SearchBudget(tokens=16000)),
        ("1.5k", SearchBudget(tokens=1500)),
        ("30s", SearchBudget(seconds=30.0)),
        ("5m", SearchBudget(seconds=300.0)),
        ("0.5h", SearchBudget(seconds=1800.0)),
    ],
)
def test_budgets(given: int | str, found: SearchBudget) -> None:
    assert parse_budget(given) == found


@pytest.mark.parametrize("given", [0, -1, 1.5, True, "0k", "0s", "0.0001k", "", "k", "5 m", "5M", "1e3", "-5m", "²k"])
def test_no_budgets(given: Any) -> None:
    with pytest.raises(UserError, match=r"must be tokens \(16000, 16k\) or a time \(30s, 5m, 2h\), not "):
        parse_budget(given)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"objective": "los"}, "unknown objective of search 'los'; did you mean 'loss'"),
        ({"proposals": 0}, "proposals of search must be a positive whole number, not 0"),
        ({"runs": "3"}, "search.runs must be a whole number, not '3'"),
        ({"beam": True}, "search.beam must be a whole number, not True"),
        ({"held_out": 1.0}, "held_out of search must be a number between 0 and 1, not 1.0"),
        ({"held_out": "half"}, "search.held_out must be a number, not 'half'"),
    ],
)
def test_options_that_cannot_be(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make_criterion("search", 6, options=option)


def test_the_price_is_known_before() -> None:
    def price(**options: Any) -> str:
        return make_criterion("search", 6, options=options).price(8, 100)

    assert price() == "about 12,800 trial tokens, more from 7 layers on"
    assert price(budget="16k") == "about 16,000 trial tokens"
    assert price(budget="5m") == "about 300 s of trials"
    assert make_criterion("bi", 6).price(8, 100) == ""
