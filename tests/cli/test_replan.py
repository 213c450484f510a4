"""``sglp-llm replan``: its plan exports what a new analysis would, and its mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import QUICK, SMALL, run_cli, save_tiny

from sglp_llm import load_plan
from sglp_llm.plan import plan_to_dict


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def pruned(tiny: Path) -> Path:
    """A pruned checkpoint with the plan of an analysis in it."""
    folder = tiny.parent / "pruned"
    assert run_cli("prune", tiny, *QUICK, "--also", "bi", "--drop", 1, "-o", folder).code == 0
    return folder


def test_its_plan_exports_what_a_new_analysis_would(tiny: Path, pruned: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    outcome = run_cli("replan", pruned, "--drop", 3, "--min-drop", 0.2, "-o", file)
    assert outcome.code == 0, outcome
    assert "Removed           3 of 6 layers: " in outcome.out
    assert outcome.out.splitlines()[-1] == f"Written           {file}"
    assert sorted(tmp_path.iterdir()) == [file]

    fresh = ("--also", "bi", "--drop", 3, "--min-drop", 0.2)
    assert run_cli("prune", tiny, *QUICK, *fresh, "-o", tmp_path / "fresh").code == 0
    assert load_plan(tmp_path / "fresh") == load_plan(file)
    assert run_cli("prune", tiny, "--plan", file, "-o", tmp_path / "planned").code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fresh", "planned")]
    assert weights[0] == weights[1]


def test_json_is_the_plan_and_nothing_is_written_without_an_output(pruned: Path, tmp_path: Path) -> None:
    before = sorted(pruned.iterdir())
    outcome = run_cli("replan", pruned / "sglp_plan.json", "--criterion", "bi", "--protect-last", 2, "--json")
    plan = json.loads(outcome.out)
    assert outcome.err == ""
    assert set(plan) == set(plan_to_dict(load_plan(pruned)))
    assert plan["settings"]["scored_by"] == "bi"
    assert (plan["budget"], len(plan["removed"])) == ({"drop": 1}, 1)
    assert sorted(pruned.iterdir()) == before


def test_what_needs_a_new_analysis_is_refused_with_its_command(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    assert run_cli("analyze", tiny, *SMALL, "--criterion", "angular", "--drop", 2, "-o", folder).code == 0
    outcome = run_cli("replan", folder, "--ratio", 0.5, "-o", tmp_path / "plan.json")
    command = f"sglp-llm analyze {tiny} --recipe {folder}/sglp_recipe.yaml --ratio 0.5 --output DIR"
    assert outcome.code == 2
    assert outcome.error == (
        f"angular gives a set for one number of layers, and no scores (the plan has scores of no criterion); "
        f"analyse again: {command}"
    )
    again = run_cli(*command.replace("DIR", str(tmp_path / "again")).split()[1:])
    assert again.code == 0
    assert len(load_plan(tmp_path / "again").removed) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ratio 0.5 -o {pruned}", "is a folder; the output is a file"),
        ("--ratio 0.5 -o {new}/none/plan.json", "there is no folder"),
        ("--ratio 0.5 -o {pruned}/sglp_plan.json", "is the plan that is read"),
        ("--ratio 0.5 -o {pruned}/sglp_plan.json --overwrite", "is the plan that is read"),
        ("--ratio 0.5 -o {pruned}/config.json", "already exists; choose another file, or replace it with --overwrite"),
        ("--ratio 1.5", "ratio 1.5 must lie between 0 and 1"),
        ("--ratio 0.5 --drop 1", "give exactly one of"),
        ("--drop 6", "at most 5 can go"),
        ("--num-segments 7", "7 segments are more than the model's 6 decoder layers"),
        ("--num-segments x", "num_segments must be a whole number or auto, not 'x'"),
        ("--min-drop -1", "min_drop must not be negative"),
        ("--features column", "features must be column_sum or rows, not 'column'"),
        ("--compensate linear", "choose with compensate none, or analyse again: sglp-llm analyze "),
        ("--criterion taylor", "the plan has scores of gradnorm, bi, cka_column_sum, and not of taylor"),
    ],
)
def test_refused(options: str, message: str, pruned: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in pruned.iterdir() if file.is_file()}
    outcome = run_cli("replan", pruned, *options.format(pruned=pruned, new=tmp_path).split())
    assert outcome.code == 2, outcome
    assert message in outcome.error
    assert {file: file.read_bytes() for file in pruned.iterdir() if file.is_file()} == before
    assert list(tmp_path.iterdir()) == []


def test_no_plan(tmp_path: Path) -> None:
    assert "there is no such plan file" in run_cli("replan", tmp_path, "--drop", 1).error
