"""Compares each method with the best single criterion, on the same windows. Pure."""

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
    """The method's gap to the dense model over the best criterion's: ``r = mean(own - dense) / mean(best - dense)``.

    The standard error is the delta method's: that of the mean of ``(own - dense) - r (best - dense)``, over
    ``mean(best - dense)``; windows are paired in both gaps.

    Args:
        own: The method's losses, one per window.
        best: The best criterion's losses.
        dense: The dense model's losses.

    Returns:
        The ratio and its standard error; ``None`` for both where the best criterion loses nothing.
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
    """Compares every method with the best single criterion of the same depth, on each measurement.

    The best is the one with the lowest perplexity on the measurement's own windows (the highest average over a suite's
    tasks). It could not be known beforehand, so the choice favours the best criterion, and no other method.

    Args:
        rows: Rows of the comparison.
        dense_losses: Losses of the dense model, by measurement.
        single: The methods that are one criterion alone.

    Returns:
        Pairs by depth, measurement and method, without the best criterion itself; none where there is no single criterion.
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
    # The examples are the same for both but not paired here, so this overestimates the error.
    known = [each for each in errors if each is not None]
    both = math.hypot(*known) if len(known) == len(errors) else None
    return Pair(row.method, best.method, len(row.removed), name, averages[0] - averages[1], both)


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
