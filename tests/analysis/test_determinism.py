"""The same recipe gives the same plan: byte for byte when repeated, and up to rounding with other threads and processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_sets import plain_set
from many_processes import in_processes
from tiny_models import Tiny, tiny_model

from sglp_llm import analyze, current_processes
from sglp_llm.criteria import ScoreCriterion, criterion_names, get_criterion
from sglp_llm.plan import plan_to_dict, save_plan

SCORES = [name for name in criterion_names() if issubclass(get_criterion(name), ScoreCriterion)]
SEQUENCES = 13

ROUNDING = 1e-6
"""Relative difference of scores whose sums are added in another order; gradients are float32."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def scored(family: str, sequences: int = SEQUENCES) -> str:
    """The plan with the scores of all criteria that give scores, as text, from all the processes that there are."""
    also = tuple(name for name in SCORES if name != "gradnorm")
    settings: dict[str, Any] = {"criterion": "sglp", "also": also, "drop": 2, "minibatch_sequences": 4}
    model = tiny_model(Tiny(family, 0))
    found = analyze(model, calibration=plain_set(sequences), processes=current_processes(), **settings)
    return json.dumps(plan_to_dict(found.plan))


def check_same(plan: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every decision is the same, and every number up to rounding."""
    assert {*SCORES} < set(expected["scores"])
    for key in expected.keys() - {"scores", "similarity"}:
        assert plan[key] == expected[key], key
    assert plan["scores"].keys() == expected["scores"].keys()
    for name, scores in expected["scores"].items():
        assert plan["scores"][name] == pytest.approx(scores, rel=ROUNDING), name
    for row, known in zip(plan["similarity"]["values"], expected["similarity"]["values"], strict=True):
        assert row == pytest.approx(known, rel=ROUNDING)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_again(family: str) -> None:
    assert scored(family) == scored(family)


@pytest.mark.slow  # threads that wait for each other are slow on a busy machine
def test_with_two_threads() -> None:
    alone = scored("llama", 3)
    with threads(2):
        once, again = scored("llama", 3), scored("llama", 3)
    assert once == again
    check_same(json.loads(once), json.loads(alone))


def test_in_two_processes(tmp_path: Path) -> None:
    alone = scored("llama")
    (tmp_path / "again").mkdir()
    (tmp_path / "once").mkdir()
    once, again = (in_processes(2, tmp_path / name, scored, "llama") for name in ("once", "again"))
    assert len({*once, *again}) == 1
    check_same(json.loads(once[0]), json.loads(alone))


@pytest.mark.parametrize("compensate", ["linear", "refit", "learned"])
def test_a_repair_is_the_same_again(compensate: str, tmp_path: Path) -> None:
    for name in ("once", "again"):
        model = tiny_model(Tiny("llama", 0))
        found = analyze(model, calibration=plain_set(16), criterion="bi", compensate=compensate, drop=2)
        (tmp_path / name).mkdir()
        save_plan(found.plan, tmp_path / name / "sglp_plan.json")
    once, again = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("once", "again"))
    assert once.keys() == again.keys()
    tensors = "sglp_plan.safetensors"
    assert once.get(tensors) == again.get(tensors)
    plans = [json.loads(each["sglp_plan.json"]) for each in (once, again)]
    assert plans[0]["compensation"]["cuts"]
    for plan in plans:
        plan["compensation"].pop("seconds", None)
    assert plans[0] == plans[1]
