"""One process that forks, and the runs that faults are tried on."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import PLAN, save_tiny
from forked import SURVIVED, Server, serving


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="session")
def server(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(source, tmp_path_factory.mktemp("printed")) as running:
        yield running


@pytest.fixture(scope="session")
def places(source: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the runs read: a checkpoint, a plan, two shortened checkpoints, the first of which is also an old output."""
    folder = tmp_path_factory.mktemp("read")
    (folder / "plan.json").write_text(json.dumps(PLAN))
    for name, plan in (("old", "0"), ("pruned", folder / "plan.json")):
        (folder / name).mkdir()
        assert server.run(folder / name, "prune", source, "-o", "out", "--plan", plan, "--no-verify").code == 0
        shutil.move(folder / name / "out", folder / f"{name}.out")
    return {"source": source, "plan": folder / "plan.json", "old": folder / "old.out", "pruned": folder / "pruned.out"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many kills were survived, by command and by signal; also those before a test that failed."""
    reports = [report for name in ("passed", "failed") for report in terminalreporter.getreports(name)]
    survived = [value for report in reports for name, value in report.user_properties if name == SURVIVED]
    if survived:
        counts = (Counter(each).most_common() for each in zip(*survived, strict=True))
        listed = "; ".join(", ".join(f"{name} {count}" for name, count in each) for each in counts)
        terminalreporter.write_line(f"kills survived: {len(survived)} ({listed})")
