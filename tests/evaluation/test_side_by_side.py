"""Scores side by side: shares, the average, its error, and what stays out of it."""

from __future__ import annotations

import math

import pytest

from sglp_llm.evaluation.records import TaskScore
from sglp_llm.evaluation.side_by_side import average, compare


def score(value: float, stderr: float | None = 0.1, metric: str = "acc", higher: bool = True) -> TaskScore:
    return TaskScore("a task", metric, value, stderr, higher)


def test_a_row_for_each_task_and_the_average_below() -> None:
    rows = compare([score(0.3), score(0.5)], [score(0.6), score(0.4)])
    assert [row.ratio for row in rows] == [pytest.approx(0.5), pytest.approx(1.25), pytest.approx(0.8)]
    assert (rows[-1].score.task, rows[-1].score.metric, rows[-1].score.value) == ("average", "acc", 0.4)
    assert rows[-1].baseline is not None
    assert rows[-1].baseline.value == 0.5


def test_the_error_of_the_average_is_that_of_independent_means() -> None:
    mean = average([score(0.2, 0.3), score(0.4, 0.4)])
    assert mean is not None
    assert mean.stderr == pytest.approx(math.sqrt(0.3**2 + 0.4**2) / 2)
    unknown = average([score(0.2, 0.3), score(0.4, None)])
    assert unknown is not None
    assert unknown.stderr is None


def test_a_perplexity_is_not_averaged_with_accuracies() -> None:
    perplexity = score(900.0, metric="word_perplexity", higher=False)
    rows = compare([score(0.3), perplexity, score(0.5, metric="acc_norm")], None)
    assert (rows[-1].score.metric, rows[-1].score.value) == ("of 2", 0.4)
    assert rows[-1].baseline is rows[-1].ratio is None
    assert average([perplexity, perplexity, score(0.3)]) is None


def test_no_share_of_nothing() -> None:
    assert compare([score(0.3)], [score(0.0)])[0].ratio is None
