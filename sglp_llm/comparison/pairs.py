"""Each method of a comparison against the best single criterion, on the same windows: pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from statistics import fmean, stdev

from sglp_llm.evaluation.side_by_side import AVERAGE
from sglp_llm.records import ComparisonRow, Pair


def paired_difference(own: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The mean of ``own - other`` over windows, and the standard error of that mean; 0 for a single window."""
    differences = [one - another for one, another in zip(own, other, strict=True)]
    return fmean(differences), _standard_error(differences)


def gap_ratio(own: Sequence[float], best: Sequence[float], dense: Sequence[float]) -> tuple[float | None, float | None]:
    """How much of the best criterion's loss over the dense model's is left: ``r = mean(own - dense) / mean(best - dense)``.

    The standard error is the delta method's: that of the mean of ``(own - dense) - r (best - dense)``, over
    ``mean(best - dense)``; windows are paired in both gaps.

    Args:
        own: Losses, one a window.
        best: Of the best criterion.
        dense: Of the whole model.

    Returns:
        The ratio and its standard error; nothing where the best criterion loses nothing, and there is no gap to share.
    """
    gaps = [one - whole for one, whole in zip(own, dense, strict=True)]
    best_gaps = [one - whole for one, whole in zip(best, dense, strict=True)]
    scale = fmean(best_gaps)
    if scale <= 0:
        return None, None
    ratio = fmean(gaps) / scale
    residuals = [gap - ratio * other for gap, other in zip(gaps, best_gaps, strict=True)]
    return ratio, _standard_error(residuals) / scale


def pairs(
    rows: Sequence[ComparisonRow], dense_losses: dict[str, tuple[float, ...]], single: Collection[str]
) -> tuple[Pair, ...]:
    """Every method against the best single criterion of the same depth, by measurement.

    The best is the one with the lowest perplexity on the very windows of the measurement (the highest average over a
    suite's tasks), as nobody knows beforehand: that flatters it, and nobody else.

    Args:
        rows: Of the comparison.
        dense_losses: Of the whole model, by measurement.
        single: The methods that are one criterion alone.

    Returns:
        By depth, measurement and method; nothing where there is no single criterion. The best one itself is left out.
    """
    found: list[Pair] = []
    for depth in dict.fromkeys(len(row.removed) for row in sorted(rows, key=lambda row: len(row.removed))):
        here = [row for row in rows if len(row.removed) == depth]
        candidates = [row for row in here if row.method in single]
        for name, dense in dense_losses.items():
            if not candidates or not (dense or AVERAGE in candidates[0].results[name]):
                continue
            best = min(candidates, key=lambda row: _cost(row, name))
            found += [_pair(row, best, name, dense) for row in here if row.method != best.method]
    return tuple(found)


def _cost(row: ComparisonRow, name: str) -> float:
    return fmean(row.losses[name]) if row.losses[name] else -row.results[name][AVERAGE]


def _pair(row: ComparisonRow, best: ComparisonRow, name: str, dense: Sequence[float]) -> Pair:
    own, other = row.losses[name], best.losses[name]
    if dense:
        ratio, ratio_error = gap_ratio(own, other, dense)
        difference, error = paired_difference(own, other)
        return Pair(row.method, best.method, len(row.removed), name, difference, error, ratio, ratio_error)
    averages = [each.results[name][AVERAGE] for each in (row, best)]
    errors = [each.results[name].get(f"{AVERAGE}_standard_error") for each in (row, best)]
    # Examples are the same and not paired here, so that this is rather too large.
    known = [each for each in errors if each is not None]
    both = math.hypot(*known) if len(known) == len(errors) else None
    return Pair(row.method, best.method, len(row.removed), name, averages[0] - averages[1], both)


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
