"""SIGKILL, SIGTERM, SIGINT and SIGHUP at moments of every command that writes: the result is whole or what was there before.

Without the variable FAULTS a few moments are tried; ``make faults`` sets it to ``every``, and a number tries so many.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_runs import LONG_RUNS, RUNS, Run, marked
from forked import SURVIVED, Server, hidden

FAULTS = os.environ.get("FAULTS")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def moments_of(total: int) -> list[tuple[int, signal.Signals]]:
    """Pairs of a moment and a signal, spread over a run; or as many as FAULTS says, with the signals in turn."""
    if FAULTS is None:
        return [(1 + total // 3, signal.SIGKILL), (total - total // 4, SIGNALS[1 + total % 3])]
    tried = total if FAULTS == "every" else min(total, int(FAULTS))
    return [(1 + number * total // tried, SIGNALS[number % len(SIGNALS)]) for number in range(tried)]


@pytest.mark.parametrize("run", marked(RUNS + LONG_RUNS), ids=str)
def test_whole_or_nothing(
    run: Run,
    places: dict[str, Path],
    server: Server,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    undisturbed = run.prepare(places, tmp_path / "undisturbed")
    old = run.result(undisturbed)
    ended = server.run(undisturbed, *run.arguments(places, undisturbed))
    assert ended.code == 0, ended.err
    whole = run.result(undisturbed)
    assert whole is not None
    assert whole != old
    assert hidden(undisturbed) == []

    for at, number in moments_of(ended.moments):
        folder = run.prepare(places, tmp_path / f"{at}-{number.name}")
        killed = server.run(folder, *run.arguments(places, folder), at=at, do=["signal", str(int(number))])
        where = f"{run}: {number.name} at moment {at} of {ended.moments}: {killed}"
        if run.works_in != "out":  # a comparison's folder grows
            assert run.result(folder) in (old, whole), where
        if number == signal.SIGKILL:
            assert killed.code == -number, where
        else:
            assert (killed.code, killed.error) == (128 + number, "interrupted"), where
            assert hidden(folder) == [], where
            left = {path.name for path in folder.iterdir()} - {"out", run.works_in, "out.pruned"}
            assert left == set(), where
        again = server.run(folder, *run.arguments(places, folder))
        assert again.code == 0, (where, again.err)
        assert run.result(folder) == whole, where
        assert hidden(folder) == [], where
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in undisturbed.iterdir())
        record_property(SURVIVED, (run.name, number.name))
