"""Numbers as text, with as many digits as a reader compares."""

from __future__ import annotations


def shown(value: float, error: float | None) -> str:
    """A number, and its standard error where there is one."""
    size = abs(value)
    text = f"{value:.4g}" if size < 1000 else f"{value:,.0f}" if size < 1_000_000 else f"{value:.3g}"
    return text if error is None else f"{text} ± {error:.2g}"
