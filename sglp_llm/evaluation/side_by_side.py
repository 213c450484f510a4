"""Scores of a model beside those of its baseline. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sglp_llm.evaluation.records import EvalResult, TaskScore

AVERAGE = "average"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        score: The model's score.
        baseline: The baseline's score; ``None`` where there is no baseline.
    """

    score: TaskScore
    baseline: TaskScore | None

    @property
    def ratio(self) -> float | None:
        """The model's number over the baseline's: the share retained, where higher is better."""
        if self.baseline is None or self.baseline.value == 0:
            return None
        return self.score.value / self.baseline.value


def compare(scores: Sequence[TaskScore], baseline: Sequence[TaskScore] | None) -> list[Row]:
    """One row per score, and their average at the bottom where there is one.

    Args:
        scores: The model's scores.
        baseline: Another model's scores, of the same tasks in the same order.
    """
    others = [None] * len(scores) if baseline is None else list(baseline)
    rows = [Row(score, other) for score, other in zip(scores, others, strict=True)]
    mean = average(scores)
    if mean is not None:
        rows.append(Row(mean, None if baseline is None else average(baseline)))
    return rows


def average(scores: Sequence[TaskScore]) -> TaskScore | None:
    """The unweighted mean of the scores for which higher is better; ``None`` when there are fewer than two.

    Perplexities are left out. The tasks' examples are independent of each other, so the variances of their means add up.
    """
    counted = [score for score in scores if score.higher_is_better]
    if len(counted) < 2:
        return None
    errors = [score.stderr for score in counted if score.stderr is not None]
    metrics = {score.metric for score in counted}
    return TaskScore(
        AVERAGE,
        metrics.pop() if len(metrics) == 1 else f"of {len(counted)}",
        sum(score.value for score in counted) / len(counted),
        math.hypot(*errors) / len(counted) if len(errors) == len(counted) else None,
        True,
    )


def perplexity_score(result: EvalResult) -> TaskScore:
    """A perplexity as a row of the table."""
    return TaskScore(result.dataset, "perplexity", result.perplexity, result.perplexity_standard_error, False)
