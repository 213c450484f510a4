"""Calibration text that the model writes itself: what `analyze` and `prune` do about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import QUICK as PAPER
from checkpoints import run_cli, save_tiny, tiny_model
from helpers import tiny_tokenizer

from sglp_llm import analyze
from sglp_llm.analysis import opening
from sglp_llm.calibration import calibration_set
from sglp_llm.engine import Need
from sglp_llm.errors import UserError
from sglp_llm.memory import FreeMemory, prediction
from sglp_llm.memory.prediction import work_of
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import Recipe, load_plan

QUICK = ("--samples", "4", "--seq-len", "16", "--criterion", "bi")
SETTINGS: dict[str, Any] = {"samples": 4, "seq_len": 16, "criterion": "bi", "drop": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sglp-llm" / "self-text"


def test_a_plan_says_self_and_the_text_is_kept(tiny: Path, cache: Path, tmp_path: Path) -> None:
    for output in (tmp_path / "a", tmp_path / "b"):
        outcome = run_cli("prune", tiny, "--drop", 2, "--calibration", "self", *QUICK, "--output", output)
        assert outcome.code == 0, outcome.err
    (file,) = cache.iterdir()
    first, second = (load_plan(tmp_path / name / "sglp_plan.json") for name in ("a", "b"))
    assert first.settings["calibration"] == "self"
    assert str(cache) not in (tmp_path / "a" / "sglp_plan.json").read_text()
    assert first.settings["calibration_hash"] == second.settings["calibration_hash"]
    written = calibration_set(tiny_tokenizer(bos=True), f"jsonl:{file}:text", samples=4, seq_len=16)
    assert first.settings["calibration_hash"] == written.hash


def test_it_may_be_a_part_of_a_mixture(tiny: Path, cache: Path) -> None:
    outcome = run_cli("analyze", tiny, "--drop", 2, "--calibration", "pydoc self:3", *QUICK, "--json")
    assert outcome.code == 0, outcome.err
    (file,) = cache.iterdir()
    mixed = calibration_set(tiny_tokenizer(bos=True), "pydoc self:3", samples=4, seq_len=16, self_file=file)
    assert mixed.hash in outcome.out
    assert json.loads(outcome.out)["plan"]["settings"]["calibration"] == "pydoc self:3"


def test_another_seed_is_another_text(tiny: Path, cache: Path) -> None:
    hashes = {
        analyze(tiny, calibration="self", seed=seed, **SETTINGS).plan.settings["calibration_hash"] for seed in (0, 1)
    }
    assert len(hashes) == len(list(cache.iterdir())) == 2


def test_a_live_model_writes_too(cache: Path) -> None:
    analysis = analyze(tiny_model(), tokenizer=tiny_tokenizer(bos=True), calibration="self", **SETTINGS)
    assert analysis.plan.settings["calibration"] == "self"
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("spec", ["self", "pydoc self"])
def test_a_streamed_model_cannot_write(tiny: Path, cache: Path, spec: str) -> None:
    outcome = run_cli("analyze", tiny, "--calibration", spec, "--engine", "streamed", *QUICK)
    assert outcome.code == 2
    assert outcome.error == (
        f"calibration {spec!r}: to write text the whole model must be in memory: "
        "leave out --engine streamed, or name another text"
    )
    assert not cache.exists()


def test_a_model_that_does_not_fit_is_not_loaded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "free_memory", lambda *_: FreeMemory(host=1000))
    monkeypatch.delattr(OpenedModel, "load")
    with pytest.raises(UserError, match="and is predicted not to fit: name another text, or --engine resident"):
        analyze(tiny, calibration="self", **SETTINGS)


def test_where_only_the_analysis_does_not_fit_the_model_writes_and_is_streamed_then(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def chosen_engine(opened: OpenedModel, recipe: Recipe) -> str:
        assert not opened.is_loaded  # what it takes would count as not free
        asked.append(recipe.criterion)
        return "resident"

    def forecast(opened: OpenedModel, recipe: Recipe) -> tuple[Any, FreeMemory]:
        assert not opened.is_loaded
        asked.append(recipe.criterion)
        found = prediction.forecast(opened, recipe)
        assert found is not None
        return replace(found[0], engine="streamed"), found[1]

    monkeypatch.setattr(opening, "chosen_engine", chosen_engine)
    monkeypatch.setattr(opening, "forecast", forecast)
    streamed = analyze(tiny, calibration="self", **SETTINGS)
    assert asked == ["random", "bi"]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    resident = analyze(tiny, calibration="self", engine="resident", **SETTINGS)
    assert resident.plan.kept == streamed.plan.kept
    assert resident.plan.settings["calibration_hash"] == streamed.plan.settings["calibration_hash"]


def test_no_text_is_written_for_another_calibration(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(opening, "self_text")
    analyze(tiny, calibration="pydoc", **SETTINGS)
    assert not cache.exists()


def test_eval_has_no_model_that_writes(tiny: Path) -> None:
    outcome = run_cli("eval", tiny, "--data", "self", "--window", 16)
    assert outcome.code == 2
    assert "self is text that a model writes, and no model writes" in outcome.error
    assert "is a mixture, and perplexity is measured on one source" in run_cli("eval", tiny, "--data", "pydoc c4").error


def test_an_export_by_a_plan_takes_the_memory_of_forward_passes_alone(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[Need] = []

    def forecast(opened: OpenedModel, recipe: Recipe) -> Any:
        planned.append(work_of(recipe).needs)
        return prediction.forecast(opened, recipe)

    monkeypatch.setattr("sglp_llm.analysis.opening.forecast", forecast)
    assert run_cli("prune", tiny, "-o", tmp_path / "out", "--plan", "2", "--no-verify").code == 0
    assert planned == [Need.NOTHING]
    assert run_cli("prune", tiny, "-o", tmp_path / "other", "--drop", 1, "--no-verify", *PAPER).code == 0
    assert planned[1] & Need.BACKWARD
