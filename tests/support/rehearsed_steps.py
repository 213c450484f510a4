"""Every criterion and every compensation of the registries, and all the numbers that they return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from placements import calibration

from sglp_llm.analysis.observing import observe
from sglp_llm.compensation import FitSettings, compensation_names, get_method
from sglp_llm.criteria import ScoreCriterion, SetCriterion, criterion_names
from sglp_llm.models.loading import DecoderModel
from sglp_llm.plan import Recipe

STEPS = [
    *(("criterion", name) for name in criterion_names()),
    *(("compensation", name) for name in compensation_names()),
]
"""Whatever the registries hold."""


def values(model: DecoderModel, kind: str, name: str, sequences: int = 3) -> list[Any]:
    """All numbers that a criterion or a compensation returns; the last batch is a smaller one."""
    given = calibration(sequences)
    if kind == "compensation":
        found = get_method(name).run(model, given, (2,), FitSettings(batch_size=2))
        return [*flat(found.report), *(value.float() for value in found.replaced.values())]
    trials = 1 if name == "gradnorm_without" else 2  # a backward pass for every layer and sequence
    recipe = Recipe(criterion=name, batch_size=2, trial_samples=trials, minibatch_sequences=2, minibatch_positions=8)
    seen = observe(model, given, recipe, [name], similarity=name == "bi")
    similarity = [] if seen.similarity is None else [seen.similarity.values.float()]
    criterion = seen.criteria[name]
    if isinstance(criterion, ScoreCriterion):
        return [*criterion.scores(), *similarity]
    assert isinstance(criterion, SetCriterion)
    return [*criterion.choose(2, range(1, model.num_layers)), *similarity]


def flat(report: Any) -> Iterator[Any]:
    if isinstance(report, dict):
        for each in report.values():
            yield from flat(each)
    elif isinstance(report, list | tuple):
        for each in report:
            yield from flat(each)
    else:
        yield report


def assert_same(found: list[Any], expected: list[Any], error: float = 1e-4) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one.cpu(), other, rtol=error, atol=error / 10)
        elif isinstance(one, float):
            assert one == pytest.approx(other, rel=error, abs=1e-7)
        else:
            assert one == other
