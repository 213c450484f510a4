"""What a run does that names neither preset, criterion nor compensation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from calibration_sets import plain_set
from checkpoints import PLAN, Outcome, run_cli
from helpers import TEXT, tiny_tokenizer
from tiny_models import Tiny, load_plain, save_tiny, tiny_model

from sglp_llm import analyze, prune
from sglp_llm.errors import UserError
from sglp_llm.plan import load_recipe, preset_settings
from sglp_llm.plan.shipped import DEFAULT_PRESET, preset_or_default

SMALL = ("--calibration", TEXT, "--samples", 4, "--seq-len", 16, "--trial-samples", 2)
SETTINGS: dict[str, Any] = {"calibration": TEXT, "samples": 4, "seq_len": 16, "trial_samples": 2, "drop": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_model(Tiny("llama", 0)), tmp_path_factory.mktemp("source") / "tiny")


def pruned(source: Path, output: Path, *options: object) -> Outcome:
    outcome = run_cli("prune", source, "-o", output, *options)
    assert outcome.code == 0, outcome
    load_plain(output)
    return outcome


def test_the_default_searches_folds_and_trains(tiny: Path, tmp_path: Path) -> None:
    pruned(tiny, tmp_path / "out", "--drop", 2, *SMALL)
    recipe = load_recipe(tmp_path / "out" / "sglp_recipe.yaml")
    assert (recipe.criterion, recipe.compensate) == ("search", "auto")
    healing = preset_settings(DEFAULT_PRESET)["heal"]
    assert recipe.heal == healing
    record = json.loads((tmp_path / "out" / "sglp_healing.json").read_text())
    assert record["teacher"]["name"] == str(tiny)
    assert record["settings"]["tokens"] == healing["tokens"]


@pytest.mark.parametrize(
    "options",
    [
        ("--criterion", "bi"),
        ("--compensate", "scale"),
        ("--no-heal",),
        ("--preset", "closed-form"),
        ("--preset", "sglp"),
    ],
    ids=" ".join,
)
def test_other_choices_do_not_train(tiny: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    pruned(tiny, tmp_path / "out", "--drop", 2, *SMALL, *options)
    assert not (tmp_path / "out" / "sglp_healing.json").exists()


def test_a_plan_is_exported_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    pruned(tiny, tmp_path / "out", "--plan", tmp_path / "plan.json")
    prune(tiny, tmp_path / "again", plan=analyze(tiny, **SETTINGS, criterion="bi").plan)
    for name in ("out", "again"):
        assert not (tmp_path / name / "sglp_healing.json").exists()
        assert load_recipe(tmp_path / name / "sglp_recipe.yaml").healing is None


def test_what_analyze_shows_is_what_prune_removes(tiny: Path, tmp_path: Path) -> None:
    plan = analyze(tiny, **SETTINGS).plan
    assert plan.settings["criterion"] == "search"
    assert plan.removed == prune(tiny, tmp_path / "out", **SETTINGS, heal=False).plan.removed


def test_a_live_model_and_token_ids_are_not_trained(tiny: Path, tmp_path: Path) -> None:
    report = prune(tiny_model(Tiny("llama", 0)), tmp_path / "live", tokenizer=tiny_tokenizer(), **SETTINGS)
    assert (report.healing, report.plan.settings["compensate"]) == (None, "auto")
    report = prune(tiny, tmp_path / "ids", calibration=plain_set(4), drop=2)
    assert (report.healing, report.plan.settings["compensate"]) == (None, "auto")


def test_a_model_that_learns_nothing_is_written_as_the_compensation_left_it(tiny: Path, tmp_path: Path) -> None:
    # At such a rate no step brings the held-out loss down.
    worse = {"learning_rate": 100.0, "warmup_steps": 0, "tokens": 64, "seq_len": 16, "sequences": 2, "repeat": True}
    settings = {**SETTINGS, "criterion": "bi", "compensate": "linear"}
    report = prune(tiny, tmp_path / "out", **settings, heal=worse)
    assert report.healing is None
    assert report.notes[0].startswith("not trained: healing made nothing better")
    assert report.verification is not None
    prune(tiny, tmp_path / "same", **settings)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "same" / "model.safetensors"
    ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "same"]


def test_text_too_short_to_hold_a_sequence_out_is_a_note(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("the of and to " * 12)
    few = {**SETTINGS, "calibration": f"text:{tmp_path / 'few.txt'}", "samples": 2, "criterion": "bi"}
    heal = {"tokens": 64, "seq_len": 40, "repeat": True}
    report = prune(tiny, tmp_path / "out", **few, heal=heal)
    assert "too few to hold one out" in report.notes[0]
    with pytest.raises(UserError, match="ask for fewer tokens"):
        prune(tiny, tmp_path / "other", **few, heal={**heal, "repeat": False, "tokens": 4000})


def test_an_old_name_of_a_preset() -> None:
    assert preset_settings("sglp") == preset_settings("paper")


def test_single_settings_that_need_no_preset() -> None:
    assert preset_or_default(None, {"criterion": None, "drop": 2}) == DEFAULT_PRESET
    assert preset_or_default(None, {"drop": 2}, "closed-form") == "closed-form"
    assert preset_or_default(None, {"compensate": "scale"}) is None
    assert preset_or_default("best", {"criterion": "bi"}) == "best"
