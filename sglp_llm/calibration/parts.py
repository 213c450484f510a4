"""Calibration sequences by what they are for: some are fitted on, the others judge."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """Calibration sequences, by what they are for: numbers of sequences, half open and disjoint."""

    fit: range
    held_out: range

    def items(self) -> list[tuple[str, range]]:
        """Name and range of each."""
        return list(vars(self).items())


def split(samples: int, held_out: float) -> Parts:
    """The last share of the sequences is held out, at least one; at least one is not.

    Args:
        samples: Number of sequences, at least 2.
        held_out: The share, in (0, 1).
    """
    assert samples > 1
    first = min(max(samples - max(int(held_out * samples + 0.5), 1), 1), samples - 1)
    return Parts(range(first), range(first, samples))
