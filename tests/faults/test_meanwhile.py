"""What others do while a run works: files that change or vanish, a second run, closed streams, a mount point."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import SMALL, run_cli
from faulty_runs import RUNS, Run, marked
from forked import Server, contents, hidden
from helpers import ROOT
from small_disks import mounted

PRUNE, OVER, _, JOURNAL, ANALYZE, HEAL, COMPARE, _ = RUNS


@pytest.mark.parametrize("run", marked((OVER, JOURNAL, HEAL, COMPARE)), ids=str)
@pytest.mark.parametrize(
    ("do", "said"),
    [
        (["copy", "model.safetensors"], "was changed while it was in use (another time"),
        (["remove", "model.safetensors"], "was removed while it was in use"),
        (["truncate", "config.json", "10"], "was changed while it was in use (another size)"),
    ],
)
def test_the_source_changes(
    run: Run, do: list[str], said: str, places: dict[str, Path], server: Server, tmp_path: Path
) -> None:
    folder = run.prepare(places, tmp_path / "work")
    copies = {name: shutil.copytree(places[name], tmp_path / name) for name in ("source", "pruned")}
    changed = copies["pruned" if run is HEAL else "source"] / do[1]
    old = run.result(folder)
    arguments = run.arguments({**places, **copies}, folder)
    # The first moments make the locks.
    ended = server.run(folder, *arguments, at=8 if run is JOURNAL else 3, do=[do[0], str(changed), *do[2:]])
    assert (ended.code, f"{changed}: {said}" in ended.error) == (2, True), ended
    assert hidden(folder) == []
    if run is not COMPARE:
        assert run.result(folder) == old


@pytest.mark.parametrize("nbytes", [0, 5000, 100_000])
def test_the_source_shrinks_while_it_is_copied(
    nbytes: int, places: dict[str, Path], server: Server, tmp_path: Path
) -> None:
    folder = PRUNE.prepare(places, tmp_path / "work")
    source = shutil.copytree(places["source"], tmp_path / "source")
    weights = source / "model.safetensors"
    arguments = PRUNE.arguments({**places, "source": source}, folder)
    ended = server.run(folder, *arguments, at=3, do=["truncate", str(weights), str(nbytes)])
    assert ended.code == 2
    assert f"{weights}: was changed while it was in use (another size)" in ended.error
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("run", [PRUNE, OVER, ANALYZE], ids=str)
def test_what_is_being_written_is_removed(run: Run, places: dict[str, Path], server: Server, tmp_path: Path) -> None:
    folder = run.prepare(places, tmp_path / "work")
    # The fourth moment is within the hidden folder; the whole current folder goes.
    ended = server.run(folder, *run.arguments(places, folder), at=4, do=["remove", str(folder)])
    assert ended.code == 2
    assert "was removed meanwhile" in ended.error
    assert not folder.exists()


def test_an_old_output_is_removed_meanwhile(places: dict[str, Path], server: Server, tmp_path: Path) -> None:
    whole = PRUNE.prepare(places, tmp_path / "whole")
    assert server.run(whole, *PRUNE.arguments(places, whole)).code == 0
    folder = OVER.prepare(places, tmp_path / "work")
    ended = server.run(folder, *OVER.arguments(places, folder), at=4, do=["remove", str(folder / "out")])
    assert ended.code == 0, ended.err
    assert OVER.result(folder) == PRUNE.result(whole)


@pytest.mark.parametrize("run", marked((PRUNE, ANALYZE, JOURNAL, HEAL, COMPARE)), ids=str)
def test_a_second_run(
    run: Run, places: dict[str, Path], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run.prepare(places, tmp_path / "work")
    old, waiting = run.result(folder), tmp_path / "waiting"
    arguments = run.arguments(places, folder)
    server.start(folder, *arguments, at=8 if run is JOURNAL else 3, do=["wait", str(waiting)])
    while not waiting.exists():
        time.sleep(0.01)
    monkeypatch.chdir(folder)
    second = run_cli(
        *(word.replace("out", "other") if run is JOURNAL and word == "out" else word for word in arguments)
    )
    waiting.unlink()
    first = server.end()
    assert second.code == 2, second
    what = "kept" if run is JOURNAL else "out"
    assert second.err.splitlines()[-1].startswith(f"sglp-llm: error: {what}: another run is working on it (process ")
    assert first.code == 0, first.err
    assert run.result(folder) != old
    assert hidden(folder) == []


def test_the_lock_of_a_dead_run_stops_nobody(places: dict[str, Path], server: Server, tmp_path: Path) -> None:
    folder = PRUNE.prepare(places, tmp_path / "work")
    (folder / ".out.lock").write_text("1\n")  # a process that lives, and never held it
    assert server.run(folder, *PRUNE.arguments(places, folder)).code == 0
    assert hidden(folder) == []


@pytest.mark.parametrize("verb", ["prune", "analyze"])
def test_an_empty_journal_is_no_folder(
    verb: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text('criterion: search\njournal: ""\ndrop: 1\n')
    ended = run_cli(verb, source, "-o", tmp_path / "out", "--recipe", "recipe.yaml", *SMALL)
    assert ended.code == 2
    assert "journal must name a folder, and is empty" in ended.error
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_point_is_not_replaced(kind: str, overwrite: bool, source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    bind = ("--bind", str(tmp_path / "elsewhere"))  # of the same file system, which os.path.ismount does not see
    with mounted(tmp_path / "mount point", *(bind if kind == "bind" else ())) as point:
        ended = run_cli("prune", source, "-o", point, "--plan", "1", *(["--overwrite"] if overwrite else []))
    assert ended.code == 2
    assert ended.error == f"{point}: is a mount point, which cannot be replaced; choose a folder inside it"


def test_closed_streams(places: dict[str, Path], server: Server, tmp_path: Path) -> None:
    open_, closed = (PRUNE.prepare(places, tmp_path / name) for name in ("open", "closed"))
    assert server.run(open_, *PRUNE.arguments(places, open_)).code == 0
    ended = server.run(closed, *PRUNE.arguments(places, closed), closed=True)
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert PRUNE.result(closed) == PRUNE.result(open_)
    assert contents(closed / "out").keys() == contents(open_ / "out").keys()


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [(">&-", 0, ""), (">&- 2>&-", 0, ""), ("<&- >&- 2>&-", 0, ""), (">/dev/full", 1, "No space left on device")],
)
def test_a_real_process_without_streams(redirection: str, code: int, said: str) -> None:
    command = f"{sys.executable} -m sglp_llm --version {redirection}"
    ended = subprocess.run(
        command, shell=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == code, ended
    assert ended.stdout == ""
    assert said in ended.stderr
    assert ended.stderr.count("\n") == (1 if said else 0), ended


@pytest.mark.slow
def test_a_comparison_that_ended_before_its_journal_was_made(
    places: dict[str, Path], server: Server, tmp_path: Path
) -> None:
    folder = COMPARE.prepare(places, tmp_path / "work")
    arguments = COMPARE.arguments(places, folder)
    assert server.run(folder, *arguments, at=4, do=["signal", str(int(signal.SIGTERM))]).code == 143
    assert [path.name for path in (folder / "out").iterdir()] == ["measured"]
    again = server.run(folder, *arguments)
    assert again.code == 0, again.err
