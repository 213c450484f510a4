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

TRAINING = "seq_len: 16\nsequences: 2\nlearning_rate: 0.001\ndtype: float32\n"
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
