"""Training as a part of ``prune``: from the recipe, in Python, and after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import run_cli
from helpers import TEXT, tiny_tokenizer
from tiny_models import Tiny, load_plain, save_tiny, tensors_of, tiny_model

from sglp_llm import Recipe, prune
from sglp_llm.errors import UserError
from sglp_llm.healing import heal as healing

HEAL = {"tokens": 128, "seq_len": 16, "sequences": 2, "learning_rate": 3e-4, "held_out": 0.3, "dtype": "float32"}
RECIPE = Recipe(criterion="bi", calibration=TEXT, samples=4, seq_len=16, drop=2, heal=HEAL)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_model(Tiny("llama", 0)), tmp_path_factory.mktemp("source") / "tiny")


def test_one_call_is_prune_and_heal(original: Path, tmp_path: Path) -> None:
    report = prune(original, tmp_path / "once", recipe=RECIPE)
    assert report.healing is not None
    assert report.output == report.healing.output == str(tmp_path / "once")
    assert report.verification is None
    assert report.healing.verification is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once"]
    prune(original, tmp_path / "pruned", recipe=RECIPE.with_changes(heal=False))
    healing.heal(tmp_path / "pruned", tmp_path / "twice", data=TEXT, **HEAL)
    for name, value in tensors_of(tmp_path / "twice").items():
        assert torch.equal(value, tensors_of(tmp_path / "once")[name])


def test_the_same_command_goes_on(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prune(original, tmp_path / "whole", recipe=RECIPE).healing
    with monkeypatch.context() as patch:
        patch.setattr(healing, "export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prune(original, tmp_path / "out", recipe=RECIPE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.healing", "out.pruned", "whole"]
    rest = prune(original, tmp_path / "out", recipe=RECIPE)
    assert whole is not None
    assert rest.healing is not None
    assert rest.healing.record.after == whole.record.after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    for name, value in tensors_of(tmp_path / "whole").items():
        assert torch.equal(value, tensors_of(tmp_path / "out")[name])


def test_text_that_is_seen_again(original: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("the of and to " * 12)
    few = RECIPE.with_changes(calibration=f"text:{tmp_path / 'few.txt'}", samples=2)
    with pytest.raises(UserError, match="ask for fewer tokens"):
        prune(original, tmp_path / "out", recipe=few)
    assert [path.name for path in tmp_path.iterdir()] == ["few.txt"]  # seen before anything was pruned
    report = prune(original, tmp_path / "out", recipe=few.with_changes(heal={"repeat": True}), overwrite=True)
    assert report.healing is not None
    record = report.healing.record
    assert record.steps == 4
    assert record.sequences < 8


def test_a_live_model_has_no_original_to_learn_from(tmp_path: Path) -> None:
    model = tiny_model(Tiny("llama", 0))
    with pytest.raises(UserError, match="heal needs the original, and a live model is shortened in place"):
        prune(model, tmp_path / "out", recipe=RECIPE, tokenizer=tiny_tokenizer())
    assert len(model.model.layers) == 6
    assert list(tmp_path.iterdir()) == []


def test_what_it_costs_is_said_before(original: Path, tmp_path: Path) -> None:
    options = ("--calibration", TEXT, "--samples", 4, "--seq-len", 16, "--drop", 2, "--heal-tokens", 128, "--seed", 5)
    (tmp_path / "heal.yaml").write_text(json.dumps(HEAL))
    more = ("--criterion", "bi", "--heal-recipe", tmp_path / "heal.yaml")
    outcome = run_cli("prune", original, "-o", tmp_path / "out", *options, *more)
    assert outcome.code == 0, outcome.err
    assert "Cost: 128 training tokens (heal)" in outcome.err
    trained = json.loads((tmp_path / "out" / "sglp_healing.json").read_text())
    assert (trained["data"], trained["settings"]["seed"]) == (TEXT, 5)  # the removal's, of which the file says nothing
    assert "Divergence" in outcome.out
    assert outcome.out.count("Written") == 1
    load_plain(tmp_path / "out")
    outcome = run_cli("analyze", original, "--preset", "fast", "--samples", 4, "--seq-len", 16, "--calibration", TEXT)
    assert outcome.code == 0, outcome.err
    assert "heal" not in outcome.err
