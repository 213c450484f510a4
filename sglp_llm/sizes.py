"""Numbers as people write them: ``2GB``, ``6.5B``."""

from __future__ import annotations

import re

from sglp_llm.errors import UserError

_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {unit.replace("B", "IB"): 1024**power for power, unit in enumerate(("", "KB", "MB", "GB", "TB")) if power}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """``"2GB"`` -> 2_000_000_000, ``"1.5GiB"`` -> 1_610_612_736.

    Raises:
        UserError: It is not a positive number with a unit of bytes.
    """
    return _parse(text, _BYTES, "a size such as 500MB, 2GB or 1.5GiB")


def parse_count(text: str) -> int:
    """``"100M"`` -> 100_000_000, ``"6.5B"`` -> 6_500_000_000.

    Raises:
        UserError: It is not a positive number with K, M, B or T.
    """
    return _parse(text.replace(",", "").replace("_", ""), _COUNTS, "a number such as 100M or 6.5B")


def parse_latency(text: str) -> tuple[float, str]:
    """``"0.8x"`` -> ``(0.8, "x")``, a share of another time; ``"25ms"`` -> ``(25.0, "ms")``.

    Raises:
        UserError: It is neither, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(x|ms)\s*", text)
    if match is None or float(match[1]) == 0:
        raise UserError(f"{text!r} is not a share such as 0.8x, or a time such as 25ms")
    return float(match[1]), match[2]


def show_count(count: int) -> str:
    """``106_234_560`` -> ``"106.2M"``."""
    for unit in ("T", "B", "M", "K"):
        if count >= _COUNTS[unit]:
            return f"{count / _COUNTS[unit]:.1f}{unit}"
    return str(count)


def show_bytes(count: int) -> str:
    """``1_100_000_000`` -> ``"1.1 GB"``."""
    for unit in ("TB", "GB", "MB", "KB"):
        if count >= _BYTES[unit]:
            return f"{count / _BYTES[unit]:.{0 if count >= 10 * _BYTES[unit] else 1}f} {unit}"
    return f"{count} B"


def _parse(text: str, units: dict[str, int], expected: str) -> int:
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in units or round(float(match[1]) * units[match[2].upper()]) < 1:
        raise UserError(f"{text!r} is not {expected}")
    return round(float(match[1]) * units[match[2].upper()])
