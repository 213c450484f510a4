"""A comparison against each criterion's own analysis and plain perplexity, killed half way and started again."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import run_cli
from helpers import ROOT, TEXT, comparison_pieces
from tiny_models import Tiny, save_tiny, tiny_model

from sglp_llm import analyze, prune
from sglp_llm.errors import UserError
from sglp_llm.plan import load_plan, plan_from_indices
from sglp_llm.trials import Journal

CRITERIA = ("sglp", "bi", "angular", "taylor", "ppl", "sleb", "kl", "random")
SETTINGS = ("--calibration", TEXT, "--samples", "4", "--seq-len", "48", "--trial-samples", "2")
MEASURES = ("--eval", "pydoc", "--eval", "pydoc:train", "--window", "48", "--max-windows", "3")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_model(Tiny("llama", 0)), tmp_path_factory.mktemp("tiny"))


def arguments(model: Path, output: Path, criteria: tuple[str, ...] = CRITERIA) -> list[str]:
    names = ",".join(criteria)
    return ["compare", str(model), "--criteria", names, "--drops", "1,3", "-o", str(output), *SETTINGS, *MEASURES]


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "comparison"
    outcome = run_cli(*arguments(tiny, output))
    assert outcome.code == 0, outcome.err
    return output


def test_every_choice_is_that_of_the_criterions_own_analysis(tiny: Path, finished: Path) -> None:
    rows = json.loads((finished / "compare.json").read_text())["rows"]
    assert [(row["method"], len(row["removed"])) for row in rows] == [(name, n) for name in CRITERIA for n in (1, 3)]
    for row in rows:
        options: dict[str, Any] = {"samples": 4, "seq_len": 48, "trial_samples": 2, "calibration": TEXT}
        plan = analyze(tiny, criterion=row["method"], drop=len(row["removed"]), **options).plan
        assert plan.removed == tuple(row["removed"])
        assert row["ratio"] == round(len(row["removed"]) / 6, 4)


def test_every_number_is_that_of_the_exported_model(tiny: Path, finished: Path, tmp_path: Path) -> None:
    comparison = json.loads((finished / "compare.json").read_text())
    row = next(row for row in comparison["rows"] if row["method"] == "angular" and len(row["removed"]) == 3)
    prune(tiny, tmp_path / "out", plan=plan_from_indices(6, row["removed"]), verify=False)
    for folder, results in ((tmp_path / "out", row["results"]), (tiny, comparison["dense"])):
        for name, numbers in results.items():
            data = name.split(" ")[0]
            outcome = run_cli("eval", folder, "--data", data, "--window", 48, "--max-windows", 3, "--json")
            assert json.loads(outcome.out)["perplexity"] == pytest.approx(numbers["perplexity"], rel=1e-6)


def test_files(finished: Path) -> None:
    assert {file.name for file in finished.iterdir()} == {
        "journal",
        "measured",
        "plans",
        "pairs.csv",
        "report.html",
        *(f"compare.{suffix}" for suffix in ("json", "csv", "md", "png", "svg")),
    }
    table = list(csv.reader((finished / "compare.csv").read_text().splitlines()))
    assert [row[0] for row in table] == ["method", "dense", *(name for name in CRITERIA for _ in (1, 3))]
    markdown = (finished / "compare.md").read_text()
    assert markdown.count("\n| sleb |") == 2 + 1  # two depths and the time of the selection
    assert (finished / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (finished / "compare.svg").read_text()


def test_killed_half_way_it_goes_on_and_ends_the_same(tiny: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "comparison"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sglp_llm", *arguments(tiny, output)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(comparison_pieces(output)) < 9:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (output / "compare.json").exists()
    before = {file: file.stat().st_mtime_ns for file in comparison_pieces(output)}
    outcome = run_cli(*arguments(tiny, output))
    assert outcome.code == 0, outcome.err
    after = {file: file.stat().st_mtime_ns for file in comparison_pieces(output)}
    assert before.items() <= after.items()
    assert len(before) < len(after) == len(comparison_pieces(finished))
    assert not list(output.glob("*/*.partial"))
    assert (output / "compare.csv").read_bytes() == (finished / "compare.csv").read_bytes()
    assert (output / "compare.svg").read_bytes() == (finished / "compare.svg").read_bytes()


def test_comparisons_share_what_is_measured(tiny: Path, finished: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shutil.copytree(finished / "measured", shared)
    before = {file: file.stat().st_mtime_ns for file in shared.iterdir()}
    for samples in ((), ("--samples", 5)):
        own, other = (
            [*arguments(tiny, tmp_path / f"{name}{len(samples)}", ("sglp", "angular", "random")), *samples]
            for name in ("own", "other")
        )
        assert run_cli(*own).code == 0
        outcome = run_cli(*other, "--measured", shared)
        assert outcome.code == 0, outcome.err
        own, other = (tmp_path / f"{name}{len(samples)}" for name in ("own", "other"))
        assert (other / "compare.csv").read_bytes() == (own / "compare.csv").read_bytes()
        assert not (other / "measured").exists()
        if not samples:
            assert before == {file: file.stat().st_mtime_ns for file in shared.iterdir()}
    assert len(list(shared.iterdir())) < len(before) + len(list((own / "measured").iterdir()))
    copy = tmp_path / "copy"  # of the same shapes, so of the same fingerprint: it may have been fine-tuned
    shutil.copytree(tiny, copy)
    outcome = run_cli(*arguments(copy, tmp_path / "copied", ("random",)), "--measured", shared)
    assert outcome.code == 2
    assert f"{shared} holds an unfinished or finished run with another model" in outcome.err


def test_measured_in_another_dtype_with_two_suites(tiny: Path, tmp_path: Path) -> None:
    shown = ("--suite", "generated", "--suite", "generation_offline", "--limit", "2")
    command = arguments(tiny, tmp_path / "out", ("bi",))
    # Both suites generate their files, and do not look for them in the folder that is for others.
    outcome = run_cli(*command, *shown, "--data-dir", tmp_path, "--measure-dtype", "bfloat16", "--json")
    assert outcome.code == 0, outcome.err
    (one, _) = json.loads(outcome.out)["rows"]
    plan = json.loads((finished_plan := tmp_path / "out" / one["plan"] / "sglp_plan.json").read_text())
    assert plan["settings"]["dtype"] == "auto"
    prune(tiny, tmp_path / "shortened", plan=load_plan(finished_plan), verify=False)
    exported = tmp_path / "shortened"
    evaluated = ("eval", exported, "--dtype", "bfloat16", "--json")
    text = json.loads(run_cli(*evaluated, "--data", "pydoc", "--window", "48", "--max-windows", "3").out)
    (windows,) = (name for name in one["results"] if name.startswith("pydoc (") or name.startswith("pydoc:test ("))
    assert one["results"][windows]["perplexity"] == pytest.approx(text["perplexity"], rel=1e-6)
    for suite in ("generated", "generation_offline"):
        found = run_cli(*evaluated, "--suite", suite, "--limit", "2", "--batch-size", "8")
        listed = [score for score in json.loads(found.out)["scores"] if score["task"] != "average"]
        scores = {f"{score['task']} {score['metric']}": score["value"] for score in listed}
        assert scores.items() <= one["results"][f"{suite} (first 2)"].items()


def test_refusals(tiny: Path, finished: Path, tmp_path: Path) -> None:
    for changed, message in (
        ((*arguments(tiny, finished), "--seed", 3), "holds an unfinished or finished run with another"),
        ((*arguments(tiny, tmp_path / "x"), "--ratios", "0.1"), "give --ratios or --drops, not both"),
        (arguments(tiny, tmp_path / "x", ("bi", "bi")), "a name stands twice"),
        (arguments(tiny, tmp_path / "x", ("bi", "angulr")), "did you mean 'angular'"),
        ((*arguments(tiny, tmp_path / "x"), "--drops", "1,x"), "must be numbers separated by commas"),
        ((*arguments(tiny, tmp_path / "x"), "--drops", "1,6"), "at most 5 can go"),
        (arguments(tiny, tiny), "exists and holds no comparison"),
        ([*arguments(tiny, tmp_path / "x")[:-6], "--eval", "nonsense"], "unknown calibration set"),
    ):
        outcome = run_cli(*changed)
        assert outcome.code == 2
        assert message in outcome.err
        assert outcome.err.count("\n") == 1
        assert not (tmp_path / "x").exists()


def test_journal(tmp_path: Path) -> None:
    calls = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        return {"order": (1, 2)}

    journal = Journal(tmp_path / "journal", {"seed": 1, "pair": (1, 2)})
    assert journal.once("piece", compute) == {"order": [1, 2]}
    assert Journal(tmp_path / "journal", {"seed": 1, "pair": (1, 2)}).once("piece", compute) == {"order": [1, 2]}
    assert calls == [1]
    with pytest.raises(UserError, match="another seed"):
        Journal(tmp_path / "journal", {"seed": 2, "pair": (1, 2)})


def test_gaps_are_paired_over_windows(finished: Path) -> None:
    comparison = json.loads((finished / "compare.json").read_text())
    for row in comparison["rows"]:
        for name, numbers in row["results"].items():
            dense = np.array(comparison["dense_losses"][name])
            gaps = np.array(row["losses"][name]) - dense
            assert len(gaps) == 3
            assert np.exp(np.mean(row["losses"][name])) == pytest.approx(numbers["perplexity"], rel=1e-9)
            assert numbers["log_gap"] == pytest.approx(
                np.log(numbers["perplexity"] / comparison["dense"][name]["perplexity"]), abs=1e-9
            )
            assert numbers["log_gap_standard_error"] == pytest.approx(np.std(gaps, ddof=1) / np.sqrt(3))
