"""Splits calibration sequences into those to fit on and those held out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """A split of the calibration sequences: half-open, disjoint ranges of sequence numbers."""

    fit: range
    held_out: range

    def items(self) -> list[tuple[str, range]]:
        """Name and range of each."""
        return list(vars(self).items())


def split(samples: int, held_out: float) -> Parts:
    """Holds out the last share of the sequences; each part gets at least one.

    Args:
        samples: Number of sequences, at least 2.
        held_out: The share, in (0, 1).
    """
    assert samples > 1
    first = min(max(samples - max(int(held_out * samples + 0.5), 1), 1), samples - 1)
    return Parts(range(first), range(first, samples))
