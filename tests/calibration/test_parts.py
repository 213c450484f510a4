"""Which calibration sequences are held out."""

from __future__ import annotations

from sglp_llm.calibration import split


def test_the_last_sequences_are_held_out() -> None:
    assert [(len(split(n, share).fit), len(split(n, share).held_out)) for n, share in TRIED] == [
        (24, 8),
        (1, 1),
        (2, 1),
        (1, 9),
        (9, 1),
    ]


TRIED = ((32, 0.25), (2, 0.25), (3, 0.25), (10, 0.99), (10, 0.01))
