"""Every family is healed: what is exported is what was trained, bit for bit, by plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import TEXT
from tiny_models import REMOVED, Tiny, every_tiny, load_plain, save_tiny, tensors_of, tiny_model, write_plan

from sglp_llm import heal, load_plan, prune


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_all_parameters(tiny: Tiny, tmp_path: Path) -> None:
    source = save_tiny(tiny_model(tiny), tmp_path / "source", max_shard_size="60KB")
    plan = load_plan(write_plan(tmp_path / "plan.json", tiny.depth, removed=list(REMOVED)))
    prune(source, tmp_path / "short", plan=plan, verify=False, engine="resident")
    report = heal(
        tmp_path / "short",
        tmp_path / "out",
        data=TEXT,
        tokens=96,
        seq_len=16,
        sequences=2,
        train="full",
        dtype="float32",
        learning_rate=3e-4,
    )
    assert report.verification is not None
    assert report.verification["max_difference"] == 0
    assert report.record.best_step > 0
    before, after = tensors_of(tmp_path / "short"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    # Tokens that the text does not have leave rows of the embedding as they were.
    same = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert not [name for name in same if before[name].numel() > 1 and "embed_positions" not in name], same
    load_plain(tmp_path / "out")
