"""Methods that are trained after the removal, against the checkpoints that ``prune`` and ``heal`` write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import run_cli
from helpers import TEXT
from tiny_models import Tiny, load_plain, save_tiny, tensors_of, tiny_model

from sglp_llm.calibration import evaluation_windows
from sglp_llm.models import find_source
from sglp_llm.models.loading import load_tokenizer
from sglp_llm.plan import shipped

TRAINING = "seq_len: 16\nsequences: 2\nlearning_rate: 0.0003\nheld_out: 0.3\ndtype: float32\n"
SETTINGS = ("--calibration", TEXT, "--samples", 4, "--seq-len", 16)


def test_a_healed_row_is_what_prune_and_heal_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = save_tiny(tiny_model(Tiny("llama", 0)), tmp_path / "tiny")
    (tmp_path / "training.yaml").write_text(f"data: {TEXT}\n{TRAINING}")
    training = ("--heal-recipe", tmp_path / "training.yaml", "--heal-tokens", 128)
    methods = ("--criteria", "bi,bi+heal,bi+scale+heal", "--drops", "2")
    measures = ("--eval", TEXT, "--window", 16, "--max-windows", 6)
    command = ("compare", tiny, *methods, *measures, *SETTINGS, *training, "-o", tmp_path / "out", "--json")
    outcome = run_cli(*command)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    rows = {row["method"]: row for row in found["rows"]}
    assert len({tuple(row["removed"]) for row in rows.values()}) == 1
    assert {pair["best"] for pair in found["pairs"]} == {"bi"}

    assert run_cli("prune", tiny, "-o", tmp_path / "plain", "--criterion", "bi", "--drop", 2, *SETTINGS).code == 0
    healing = ("--recipe", tmp_path / "training.yaml", "--tokens", 128)
    assert run_cli("heal", tmp_path / "plain", "-o", tmp_path / "healed", *healing).code == 0
    windows = evaluation_windows(load_tokenizer(find_source(tiny)), TEXT, window=16, max_windows=6).input_ids
    model = load_plain(tmp_path / "healed")
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in windows]
    (name,) = rows["bi"]["losses"]
    assert rows["bi+heal"]["losses"][name] == pytest.approx(losses, rel=1e-4)
    assert rows["bi+heal"]["losses"][name] != pytest.approx(rows["bi"]["losses"][name], rel=1e-3)
    kept = sorted((tmp_path / "out" / "healed").glob("*/trained"))
    assert len(kept) == 2
    both = [tensors_of(folder) for folder in (*kept, tmp_path / "healed")]
    assert any(all(torch.equal(value, each[key]) for key, value in both[-1].items()) for each in both[:-1])

    monkeypatch.setattr("sglp_llm.comparison.healed.heal", None)  # nothing is trained again
    assert json.loads(run_cli(*command).out)["rows"] == found["rows"]


def test_a_preset_may_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "presets").mkdir()
    heal = "{tokens: 128, seq_len: 16, sequences: 2, learning_rate: 0.0003, held_out: 0.3, dtype: float32}"
    (tmp_path / "presets" / "trained.yaml").write_text(f"# Trained.\ncriterion: bi\nheal: {heal}\n")
    monkeypatch.setattr(shipped, "_PRESETS", tmp_path / "presets")
    source = save_tiny(tiny_model(Tiny("llama", 0)), tmp_path / "tiny")
    command = (
        "--criteria",
        "bi,trained",
        "--drops",
        "2",
        "--eval",
        TEXT,
        "--window",
        16,
        "--max-windows",
        6,
        *SETTINGS,
    )
    outcome = run_cli("compare", source, "-o", tmp_path / "out", *command, "--json")
    assert outcome.code == 0, outcome.err
    rows = {row["method"]: row for row in json.loads(outcome.out)["rows"]}
    assert rows["bi"]["removed"] == rows["trained"]["removed"]
    outcome = run_cli(
        "prune", source, "-o", tmp_path / "short", "--preset", "trained", "--drop", 2, *SETTINGS, "--json"
    )
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["healing"]["record"]["steps"] == 4
    assert report["output"] == str(tmp_path / "short")
    (kept,) = (tmp_path / "out" / "healed").glob("*/trained")
    for name, value in tensors_of(kept).items():
        assert torch.equal(value, tensors_of(tmp_path / "short")[name])
    without = run_cli(
        "prune", source, "-o", tmp_path / "plain", "--preset", "trained", "--no-heal", "--drop", 2, *SETTINGS
    )
    assert without.code == 0, without.err
    assert not (tmp_path / "plain" / "sglp_healing.json").exists()
    again = ("--recipe", tmp_path / "short" / "sglp_recipe.yaml")
    assert run_cli("prune", "-o", tmp_path / "again", *again, "--json").code == 0
    for name, value in tensors_of(tmp_path / "short").items():
        assert torch.equal(value, tensors_of(tmp_path / "again")[name])
