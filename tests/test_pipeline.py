"""The whole story: whatever was asked for, the checkpoint does what the report says, and engines do not tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from calibration_sets import ids_and_mask, labels_of, padded_set, sampled_set
from tiny_models import Tiny, every_tiny, save_tiny, tiny_model
from transformers import AutoModelForCausalLM

from sglp_llm import PrunePlan, prune
from sglp_llm.calibration import CalibrationSet, split

HELD_OUT = 0.25


def drawn(seed: int) -> tuple[Tiny, int, str | None, dict[str, Any]]:
    """A family, the number and padding of the calibration sequences, and settings that it takes."""
    draw = Random(seed)
    tiny = draw.choice(every_tiny())
    asked = {
        "criterion": draw.choice(["random", "random", "random", "taylor", "search"]),
        "compensate": draw.choice(["learned", "learned", "scale"]),  # every family takes both
        "drop": draw.randint(1, tiny.depth // 2 + 1),
        "protect": {"first": draw.randint(0, 1), "last": draw.randint(0, 1)},
        "seed": draw.randint(0, 9),
        "candidates": draw.randint(1, 3),
        "batch_size": draw.choice([1, 2, 8]),
    }
    return tiny, draw.randint(2, 9), draw.choice([None, "left", "right"]), asked


@pytest.mark.parametrize("seed", range(16))
def test_the_checkpoint_does_what_the_report_says(seed: int, tmp_path: Path) -> None:
    tiny, sequences, padding, asked = drawn(seed)
    folder, model = tmp_path / "model", tiny_model(tiny)
    calibration = sampled_set(model, sequences) if padding is None else padded_set(sequences, padding)
    save_tiny(model, folder)
    resident, streamed = (
        prune(folder, tmp_path / engine, calibration=calibration, engine=engine, held_out=HELD_OUT, **asked).plan
        for engine in ("resident", "streamed")
    )
    assert streamed.removed == resident.removed
    assert set(streamed.replaced) == set(resident.replaced)
    for name, value in resident.replaced.items():
        torch.testing.assert_close(streamed.replaced[name], value, rtol=1e-3, atol=1e-4)
    shortened = AutoModelForCausalLM.from_pretrained(tmp_path / "resident", dtype=torch.float32).eval()
    for part, (said, members) in losses_said(resident, sequences).items():
        losses = [loss(shortened, calibration, index) for index in members]
        assert said == pytest.approx(sum(losses) / len(losses), rel=1e-4), part


def losses_said(plan: PrunePlan, sequences: int) -> dict[str, tuple[float, Sequence[int]]]:
    """What the report has for the model that was written, by part, and the sequences that it is of; none without a repair."""
    report = plan.compensation
    if not report["losses"]:
        return {}
    parts, refined = split(sequences, HELD_OUT), report.get("refined")
    if refined is None:
        return {part: (report["losses"][part]["with"], members) for part, members in parts.items()}
    taken = "with" if refined["taken"] else "without"
    members = {"fit": parts.fit[: refined["sequences"]["fit"]], "held_out": parts.held_out}
    return {part: (refined["losses"][part][taken], each) for part, each in members.items()}


def loss(model: torch.nn.Module, calibration: CalibrationSet, index: int) -> float:
    ids, mask = calibration.input_ids[index], calibration.mask[index]
    with torch.no_grad():
        return float(model(**ids_and_mask(ids, mask), labels=labels_of(ids, mask), use_cache=False).loss)
