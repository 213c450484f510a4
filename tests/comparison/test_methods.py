"""Compensated rows of a comparison against `prune` and plain transformers, and its pairs against numpy."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import run_cli
from helpers import ROOT, TEXT, comparison_pieces, tiny_tokenizer
from tiny_models import Tiny, load_plain, save_tiny, tiny_model

from sglp_llm.analysis.decisions import repair_best
from sglp_llm.calibration import calibration_set, evaluation_windows
from sglp_llm.comparison.methods import chooser, is_single, method_recipe
from sglp_llm.comparison.pairs import pairs
from sglp_llm.compensation import FitSettings, get_method
from sglp_llm.criteria import criterion_names
from sglp_llm.engine.modes import replaced_weights, skipped
from sglp_llm.models import find_source
from sglp_llm.models.loading import load_tokenizer
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import Recipe, load_plan, preset_names, preset_settings
from sglp_llm.records import Budget, ComparisonRow

METHODS = ("angular", "angular+linear", "bi+scale", "bi+linear", "search", "sglp-search", "sglp-search+linear", "bi")
SETTINGS = ("--calibration", TEXT, "--samples", "8", "--seq-len", "48", "--trial-samples", "2")
WINDOWS = 20  # two pieces
MEASURES = ("--eval", "pydoc", "--window", "32", "--max-windows", str(WINDOWS))
NAME = f"pydoc:test ({WINDOWS} x 32)"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned a little of the text: what a random one loses cannot be restored."""
    model = tiny_model(Tiny("llama", 0))
    ids = calibration_set(tiny_tokenizer(), TEXT, samples=64, seq_len=48).input_ids
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = ids.roll(-8 * step, 0)[:8]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return save_tiny(model, tmp_path_factory.mktemp("tiny"))


def arguments(model: Path, output: Path, methods: tuple[str, ...] = METHODS) -> list[str]:
    names = ",".join(methods)
    return ["compare", str(model), "--criteria", names, "--drops", "1,3", "-o", str(output), *SETTINGS, *MEASURES]


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "comparison"
    outcome = run_cli(*arguments(tiny, output))
    assert outcome.code == 0, outcome.err
    return output


@pytest.fixture(scope="module")
def result(finished: Path) -> dict[str, Any]:
    return dict(json.loads((finished / "compare.json").read_text()))


def row_of(result: dict[str, Any], method: str, count: int) -> dict[str, Any]:
    return next(row for row in result["rows"] if row["method"] == method and len(row["removed"]) == count)


def plain_losses(folder: Path, tokenizer: Any) -> list[float]:
    """What transformers itself gives for every window."""
    windows = evaluation_windows(tokenizer, "pydoc", window=32, max_windows=WINDOWS).input_ids
    model = load_plain(folder)
    with torch.no_grad():
        return [float(model(input_ids=each[None], labels=each[None]).loss) for each in windows]


@pytest.mark.parametrize(
    ("method", "compensation", "count"), [("angular", "linear", 3), ("bi", "scale", 1), ("sglp-search", "linear", 3)]
)
def test_a_compensated_row_is_what_prune_writes(
    method: str, compensation: str, count: int, tiny: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    options = ("--criterion", method.removeprefix("sglp-"), "--compensate", compensation, "--drop", count, *SETTINGS)
    outcome = run_cli("prune", tiny, "-o", tmp_path / "out", *options, "--no-verify")
    assert outcome.code == 0, outcome.err
    row = row_of(result, f"{method}+{compensation}", count)
    assert load_plan(tmp_path / "out").removed == tuple(row["removed"])
    losses = plain_losses(tmp_path / "out", load_tokenizer(find_source(tiny)))
    assert row["losses"][NAME] == pytest.approx(losses, rel=1e-5)
    assert row["losses"][NAME] != pytest.approx(row_of(result, method, count)["losses"][NAME], rel=1e-4)
    assert np.mean(row["losses"][NAME]) < np.mean(row_of(result, method, count)["losses"][NAME])


def test_every_plan_can_be_applied(tiny: Path, finished: Path, result: dict[str, Any], tmp_path: Path) -> None:
    assert {row["plan"] for row in result["rows"]} == {f"plans/{each.name}" for each in (finished / "plans").iterdir()}
    for number, method in enumerate(("sglp-search+linear", "bi+scale", "search")):
        row = row_of(result, method, 3)
        out = tmp_path / str(number)
        outcome = run_cli("prune", tiny, "-o", out, "--plan", finished / row["plan"], "--no-verify")
        assert outcome.code == 0, outcome.err
        losses = plain_losses(out, load_tokenizer(find_source(tiny)))
        assert row["losses"][NAME] == pytest.approx(losses, rel=1e-5)
        settings = load_plan(finished / row["plan"]).settings
        assert settings["criterion"] == ("bi" if number == 1 else "search")
        assert settings["compensate"] == method.partition("+")[2] or settings["compensate"] == "none"


def test_who_chooses_alike_chooses_once(result: dict[str, Any]) -> None:
    assert set(result["selection_seconds"]) == {"shared pass", "search"}
    for count in (1, 3):
        plain, preset = row_of(result, "search", count), row_of(result, "sglp-search", count)
        assert {**plain, "method": "", "plan": ""} == {**preset, "method": "", "plan": ""}
    # Both remove the same layer, which is repaired once.
    angular, bi = (row_of(result, f"{method}+linear", 1) for method in ("angular", "bi"))
    assert {**angular, "method": "", "plan": ""} == {**bi, "method": "", "plan": ""}
    seconds = {row["method"]: row["compensation_seconds"] for row in result["rows"]}
    assert {method for method, value in seconds.items() if value > 0} == {each for each in METHODS if "+" in each}


def test_pairs_by_hand(finished: Path, result: dict[str, Any]) -> None:
    dense = np.array(result["dense_losses"][NAME])
    for count in (1, 3):
        losses = {m: np.array(row_of(result, m, count)["losses"][NAME]) for m in METHODS}
        best = min(("angular", "bi"), key=lambda m: losses[m].mean())
        found = [pair for pair in result["pairs"] if pair["layers_removed"] == count]
        assert [pair["method"] for pair in found] == [m for m in METHODS if m != best]
        for pair in found:
            own, other = losses[pair["method"]] - dense, losses[best] - dense
            assert (pair["best"], pair["measurement"]) == (best, NAME)
            assert pair["difference"] == pytest.approx((own - other).mean(), abs=1e-12)
            assert pair["difference_standard_error"] == pytest.approx((own - other).std(ddof=1) / np.sqrt(WINDOWS))
            ratio = own.mean() / other.mean()
            assert pair["gap_ratio"] == pytest.approx(ratio)
            spread = np.cov(own, other)  # the textbook's form of the delta method
            variance = spread[0, 0] - 2 * ratio * spread[0, 1] + ratio**2 * spread[1, 1]
            error = np.sqrt(max(variance, 0) / WINDOWS) / other.mean()
            assert pair["gap_ratio_standard_error"] == pytest.approx(error, rel=1e-6, abs=1e-7)
    table = list(csv.DictReader((finished / "pairs.csv").read_text().splitlines()))
    assert [float(line["difference"]) for line in table] == [pair["difference"] for pair in result["pairs"]]
    markdown = (finished / "compare.md").read_text()
    assert markdown.count("\n| 3 | pydoc:test") == len(METHODS) - 1
    assert markdown.count("\n| angular+linear |") == 2 + 2  # two depths, and the seconds of both


def row(method: str, results: dict[str, float], losses: tuple[float, ...] = ()) -> ComparisonRow:
    return ComparisonRow(method, 0.5, (1,), {"it": results}, {"it": losses}, "", 0.0)


def test_pairs_of_a_suite_and_of_a_criterion_that_loses_nothing() -> None:
    rows = [
        row("bi", {"average": 0.4, "average_standard_error": 0.03}),
        row("angular", {"average": 0.5, "average_standard_error": 0.03}),
        row("best", {"average": 0.7, "average_standard_error": 0.04}),
    ]
    worse, better = pairs(rows, {"it": ()}, ["bi", "angular"])
    assert (worse.method, better.method, better.best) == ("bi", "best", "angular")
    assert (better.difference, better.difference_standard_error) == pytest.approx((0.2, 0.05))
    assert better.gap_ratio is None
    assert pairs(rows, {"it": ()}, []) == ()
    (pair,) = pairs([row("bi", {}, (1.0, 1.0)), row("best", {}, (2.0, 4.0))], {"it": (1.0, 2.0)}, ["bi"])
    assert (pair.difference, pair.difference_standard_error) == pytest.approx((2.0, 1.0))
    assert pair.gap_ratio is None


def test_killed_inside_the_compensations_it_goes_on_and_ends_the_same(
    tiny: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "comparison"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sglp_llm", *arguments(tiny, output)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(output.glob("plans/*angular+linear")):
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    before = {file: file.stat().st_mtime_ns for file in comparison_pieces(output)}
    outcome = run_cli(*arguments(tiny, output))
    assert outcome.code == 0, outcome.err
    after = {file: file.stat().st_mtime_ns for file in comparison_pieces(output)}
    assert before.items() <= after.items()
    assert len(before) < len(after) == len(comparison_pieces(finished))
    for file in ("compare.csv", "pairs.csv", "compare.svg"):
        assert (output / file).read_bytes() == (finished / file).read_bytes()
    plans = {file.relative_to(finished) for file in finished.glob("plans/*/*")}
    assert {file.relative_to(output) for file in output.glob("plans/*/*")} == plans
    for file in plans:
        assert (output / file).read_bytes() == (finished / file).read_bytes()


def test_finished_work_is_not_done_again(tiny: Path, finished: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in comparison_pieces(finished)}
    csv_before = (finished / "compare.csv").read_bytes()
    assert run_cli(*arguments(tiny, finished)).code == 0
    assert before == {file: file.stat().st_mtime_ns for file in comparison_pieces(finished)}
    assert csv_before == (finished / "compare.csv").read_bytes()


def test_a_suite_has_an_average_and_pairs(tiny: Path, tmp_path: Path) -> None:
    names = ("bi", "angular", "bi+linear")
    suite = ("--suite", ROOT / "eval" / "generated.yaml", "--limit", 4)
    outcome = run_cli(*arguments(tiny, tmp_path / "out", names), *suite, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    (name,) = {*result["dense"]} - {NAME}
    for row in result["rows"]:
        numbers = row["results"][name]
        tasks = [key for key in numbers if key.endswith(" acc")]
        assert len(tasks) == 3
        assert numbers["average"] == pytest.approx(np.mean([numbers[task] for task in tasks]))
        errors = [numbers[f"{task}_standard_error"] for task in tasks]
        assert numbers["average_standard_error"] == pytest.approx(np.sqrt(np.square(errors).sum()) / 3)
    for count in (1, 3):
        averages = {method: row_of(result, method, count)["results"][name]["average"] for method in names}
        best = max(("bi", "angular"), key=lambda method: averages[method])
        found = [pair for pair in result["pairs"] if (pair["layers_removed"], pair["measurement"]) == (count, name)]
        assert [(pair["method"], pair["best"]) for pair in found] == [(m, best) for m in names if m != best]
        assert [pair["difference"] for pair in found] == [averages[m] - averages[best] for m in names if m != best]
    assert f"| 3 | {name} | bi+linear |" in (tmp_path / "out" / "compare.md").read_text()


def test_seeds_give_means_and_spreads(tiny: Path, tmp_path: Path) -> None:
    names = ("bi", "angular+linear", "random")
    outcome = run_cli(*arguments(tiny, tmp_path / "out", names), "--seeds", "0,3,5", "--json")
    assert outcome.code == 0, outcome.err
    together = json.loads(outcome.out)
    one = run_cli(*arguments(tiny, tmp_path / "one", names), "--seed", "3")
    assert one.code == 0, one.err
    alone = (tmp_path / "one" / "compare.csv").read_bytes()
    assert alone == (tmp_path / "out" / "seed-3" / "compare.csv").read_bytes()
    table = list(csv.DictReader((tmp_path / "out" / "seeds.csv").read_text().splitlines()))
    assert len(table) == len(together["spreads"]) == 3 * 2 * 2  # perplexity and log_gap
    for line in table:
        count = int(line["layers_removed"])
        rows = [row_of(together["seeds"][seed], line["method"], count) for seed in ("0", "3", "5")]
        values = [row["results"][NAME][line["number"]] for row in rows]
        assert float(line["mean"]) == pytest.approx(np.mean(values))
        assert float(line["standard_deviation"]) == pytest.approx(np.std(values, ddof=1), abs=1e-9)
        assert int(line["different_choices"]) == len({tuple(row["removed"]) for row in rows})
    assert "\n| angular+linear | 3 | " in (tmp_path / "out" / "seeds.md").read_text()


def test_a_candidate_that_nothing_can_repair_loses_to_one_that_can(tiny: Path) -> None:
    """Nothing is in front of a cut of the first layers."""
    opened = OpenedModel(tiny)
    calibration = calibration_set(opened.tokenizer, TEXT, samples=8, seq_len=48)
    recipe = Recipe(compensate="linear", drop=1)
    removed, compensated = repair_best(opened, recipe, calibration, [(0,), (5,)])
    assert removed == (5,)
    assert compensated.replaced
    assert [each["held_out_loss"] is None for each in compensated.report["candidates"]] == [True, False]
    assert repair_best(opened, recipe, calibration, [(0,)])[0] == (0,)


def test_methods_by_name() -> None:
    budget = Budget(drop=2)
    base = Recipe(
        compensate="scale", trial_samples=4, options={"search": {"budget": "1k"}, "angular": {"tokens": "all"}}
    )
    found = method_recipe(base, "angular+linear", budget)
    assert (found.criterion, found.compensate, found.drop) == ("angular", "linear", 2)
    assert found.options == {"angular": {"tokens": "all"}}
    assert method_recipe(base, "bi", budget).compensate == "none"
    searching = method_recipe(base, "best+none", budget)
    assert (searching.criterion, searching.compensate) == ("search", "none")
    assert searching.options == {"search": {"budget": "1k"}}
    best = method_recipe(base, "best", budget)
    assert (best.compensate, best.heal) == ("auto", preset_settings("best")["heal"])
    assert [chooser(base, name, budget) for name in ("best", "search", "angular+linear", "sglp")] == [
        "search",
        "search",
        "angular",
        "sglp",
    ]
    single = [
        n for n in ("bi", "sglp", "search", "sglp-search", "bi+scale") if is_single(method_recipe(base, n, budget))
    ]
    assert single == ["bi", "sglp"]


def test_the_papers_method_is_a_criterion_and_a_preset() -> None:
    assert {*preset_names()}.isdisjoint({"sglp", *criterion_names()})
    of_the_paper = Recipe(criterion="sglp", drop=2)
    assert method_recipe(Recipe(), "sglp", Budget(drop=2)) == of_the_paper
    assert method_recipe(Recipe(), "paper", Budget(drop=2)) == of_the_paper


def test_refusals(tiny: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    normed = save_tiny(tiny_model(Tiny("olmo2", 0)), tmp_path / "olmo2")
    for changed, message in (
        ((*arguments(tiny, out), "--seeds", "1"), "at least two"),
        ((*arguments(tiny, out), "--seeds", "1,x"), "must be whole numbers"),
        ((*arguments(tiny, out), "--seeds", "1,2", "--seed", "1"), "give --seed or --seeds, not both"),
        ((*arguments(tiny, finished), "--seeds", "1,2"), "exists and holds no comparison"),
        (arguments(tiny, out, ()), "criteria: name at least one"),
        (arguments(tiny, out, ("bi", "angulr+linear")), "did you mean 'angular'"),
        (arguments(tiny, out, ("bi", "sglp-serch")), "did you mean 'sglp-search'"),
        (arguments(tiny, out, ("bi", "angular+liner")), "did you mean 'linear'"),
        (arguments(tiny, out, ("bi+linear", "bi+linear")), "a name stands twice"),
        ((*arguments(tiny, out), "--option", "taylor.x=1"), "option"),
        ((*arguments(tiny, out), "--option", "search.objective=x"), "unknown objective"),
        ((*arguments(tiny, out), "--option", "slp.metric=cosine"), "slp is not among the criteria of this run"),
        ((*arguments(tiny, out), "--samples", "1", "--trial-samples", "1"), "at least 2 samples"),
        (arguments(normed, out, ("bi", "bi+linear")), "--compensate scale works there"),
        (
            (*arguments(tiny, finished), "--option", "search.budget=1k"),
            "holds an unfinished or finished run with another",
        ),
    ):
        outcome = run_cli(*changed)
        assert outcome.code == 2
        assert message in outcome.err
        assert outcome.err.count("\n") == 1
        assert not out.exists()


def test_candidates_are_judged_by_the_loss_after_the_repair_on_a_quarter_of_the_first_sequences(tiny: Path) -> None:
    opened = OpenedModel(tiny)
    calibration = calibration_set(opened.tokenizer, TEXT, samples=40, seq_len=16)
    sets = [(1, 2), (3, 4), (1, 4)]
    recipe = Recipe(compensate="linear", drop=2, candidates=3, held_out=0.1)
    removed, compensated = repair_best(opened, recipe, calibration, sets)
    model, losses = opened.load(), []
    for each in sets:
        repaired = get_method("linear").run(model, calibration.first(32), each, FitSettings(held_out=0.25)).replaced
        with skipped(model.layers, each), replaced_weights(model, repaired), torch.no_grad():
            held_out = calibration.input_ids[24:32]
            losses.append(float(model.model(input_ids=held_out, labels=held_out).loss))
    assert compensated.report["candidates"] == [
        {"removed": list(each), "held_out_loss": pytest.approx(loss, rel=1e-5)}
        for each, loss in zip(sets, losses, strict=True)
    ]
    assert removed == sets[losses.index(min(losses))]
