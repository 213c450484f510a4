"""Finalists of a search that are scored on tasks, against plain evaluations of their exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import SMALL, run_cli
from tiny_models import Tiny, save_tiny, tiny_model

from sglp_llm import analyze, prune
from sglp_llm.plan import plan_from_indices

TASK = "search.objective=task:generated"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_model(Tiny("llama", 0)), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglp_llm.evaluation.judge._EXAMPLES", 12)


def score(folder: Path) -> float:
    outcome = run_cli("eval", folder, "--suite", "generated", "--limit", 12, "--batch-size", 8, "--json")
    assert outcome.code == 0, outcome.err
    found = [each["value"] for each in json.loads(outcome.out)["scores"] if each["task"] != "average"]
    assert len(found) == 3
    return sum(found) / 3


@pytest.mark.parametrize("compensate", ["none", "linear"])
def test_the_finalist_that_is_best_at_the_tasks_is_taken(tiny: Path, tmp_path: Path, compensate: str) -> None:
    options = {"search": {"objective": "task:generated"}}
    plan = analyze(
        tiny, criterion="search", drop=2, compensate=compensate, candidates=3, options=options, calibration="pydoc",
        samples=4, seq_len=32,
    ).plan  # fmt: skip
    judged = plan.compensation["candidates"]
    assert len(judged) == 3
    assert plan.settings["search"]["objective"] == "task:generated"
    assert tuple(max(judged, key=lambda each: each["score"])["removed"]) == plan.removed
    if compensate == "none":
        for number, each in enumerate(judged):
            prune(tiny, tmp_path / str(number), plan=plan_from_indices(6, each["removed"]), verify=False)
            assert each["score"] == pytest.approx(score(tmp_path / str(number)))


def test_a_comparison_scores_its_finalists_too(tiny: Path, tmp_path: Path) -> None:
    command = (
        "compare",
        tiny,
        "--criteria",
        "search,search+linear",
        "--drops",
        2,
        "-o",
        tmp_path / "out",
        "--option",
        TASK,
    )
    outcome = run_cli(*command, *SMALL, "--eval", "pydoc", "--window", 32, "--max-windows", 2, "--json")
    assert outcome.code == 0, outcome.err
    for row in json.loads(outcome.out)["rows"]:
        plan = json.loads((tmp_path / "out" / row["plan"] / "sglp_plan.json").read_text())
        best = max(plan["compensation"]["candidates"], key=lambda each: each["score"])
        assert best["removed"] == row["removed"]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("task:", "objective of search: task: must be followed by the name of a task or a suite"),
        ("task:generatd", "generatd"),
        ("tasks", "unknown objective of search 'tasks'"),
    ],
)
def test_refusals(tiny: Path, tmp_path: Path, objective: str, message: str) -> None:
    out = tmp_path / "out"
    command = ("analyze", tiny, "--criterion", "search", "--drop", 2, "--output", out, *SMALL)
    outcome = run_cli(*command, "--option", f"search.objective={objective}")
    assert outcome.code == 2
    assert message in outcome.err.splitlines()[-1]
    assert not out.exists()


def test_tasks_need_the_whole_model(tiny: Path, tmp_path: Path) -> None:
    command = ("analyze", tiny, "--criterion", "search", "--drop", 2, "--engine", "streamed", *SMALL, "--option", TASK)
    outcome = run_cli(*command)
    assert (outcome.code, outcome.err.count("Traceback")) == (2, 0)
    assert "needs the whole model in memory" in outcome.err
