"""Folders that appear complete or not at all: against exceptions and races."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sglp_llm.checkpoint import atomic_folder, publish
from sglp_llm.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuse(code: int) -> Callable[..., int]:
    """A system call that fails."""

    def call(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


def test_folder_appears_at_the_end_with_normal_permissions(tmp_path: Path) -> None:
    output = tmp_path / "new" / "parents" / "output"
    old = os.umask(0o027)
    try:
        with atomic_folder(output) as folder:
            assert folder.parent == output.parent
            assert folder.name.startswith(".output.partial-")
            assert names(folder) == []
            (folder / "config.json").write_text("{}")
            assert not output.exists()
    finally:
        os.umask(old)
    assert names(output) == ["config.json"]
    assert names(output.parent) == ["output"]
    assert output.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_nothing_is_left_after_an_exception(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "new" / "parents" / "output") as folder:  # noqa: PT012
        (folder / "model.safetensors").touch()
        raise error
    assert names(tmp_path) == []


def test_parents_that_somebody_else_uses_meanwhile_stay(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "new" / "parents" / "output"):  # noqa: PT012
        (tmp_path / "new" / "mine").touch()
        raise RuntimeError
    assert names(tmp_path / "new") == ["mine"]


def test_old_folder_stays_after_an_exception(tmp_path: Path) -> None:
    output = model(tmp_path / "output", "old")
    with pytest.raises(RuntimeError), atomic_folder(output, overwrite=True) as folder:  # noqa: PT012
        model(folder, "new")
        raise RuntimeError
    assert (output / "config.json").read_text() == "old"
    assert names(tmp_path) == ["output"]


def model(folder: Path, content: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(content)
    return folder


@pytest.fixture(params=["renameat2", "in steps", "no renameat2 in libc"])
def renaming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system call, and with what is done where it is missing."""
    if request.param == "in steps":
        monkeypatch.setattr(publish, "_renameat2", refuse(errno.EINVAL))
    if request.param == "no renameat2 in libc":
        monkeypatch.setattr(publish.ctypes, "CDLL", lambda *_, **__: object())
    return str(request.param)


@pytest.mark.usefixtures("renaming")
def test_overwrite_replaces_the_old_folder_as_a_whole(tmp_path: Path) -> None:
    output = model(tmp_path / "output", "old")
    (output / "stale.txt").touch()
    with atomic_folder(output, overwrite=True) as folder:
        model(folder, "new")
        assert (output / "config.json").read_text() == "old"
    assert names(output) == ["config.json"]
    assert (output / "config.json").read_text() == "new"
    assert names(tmp_path) == ["output"]


@pytest.mark.usefixtures("renaming")
def test_overwrite_replaces_an_empty_folder_and_needs_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        with atomic_folder(tmp_path / name, overwrite=True) as folder:
            model(folder, "new")
        assert (tmp_path / name / "config.json").exists()
    assert names(tmp_path) == ["empty", "none"]


def test_old_folder_comes_back_when_the_second_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = model(tmp_path / "output", "old")
    monkeypatch.setattr(publish, "_renameat2", refuse(errno.ENOSYS))
    with pytest.raises(UserError, match="was removed meanwhile"), atomic_folder(output, overwrite=True) as folder:
        folder.rmdir()
    assert (output / "config.json").read_text() == "old"
    assert names(tmp_path) == ["output"]


@pytest.mark.parametrize("content", [[], ["config.json"], ["notes.txt"]])
def test_existing_output_is_refused_at_once(content: list[str], tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    for name in content:
        (output / name).touch()
    with pytest.raises(UserError, match=r"output: already exists; .*--overwrite"), atomic_folder(output):
        raise AssertionError
    assert names(output) == content
    assert names(tmp_path) == ["output"]


def test_overwrite_spares_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").touch()
    with (
        pytest.raises(UserError, match=r"neither a model nor an analysis"),
        atomic_folder(tmp_path, overwrite=True),
    ):
        raise AssertionError
    assert names(tmp_path) == ["diary.txt"]


@pytest.mark.usefixtures("renaming")
@pytest.mark.parametrize("content", [[], ["config.json"]])
def test_output_that_appears_meanwhile_is_refused(content: list[str], tmp_path: Path) -> None:
    output = tmp_path / "output"
    with pytest.raises(UserError, match="output: already exists"), atomic_folder(output) as folder:  # noqa: PT012
        model(folder, "new")
        output.mkdir()
        for name in content:
            (output / name).touch()
    assert names(output) == content
    assert names(tmp_path) == ["output"]


def test_output_that_appears_after_the_last_look_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "output"
    rename = publish._renameat2

    def somebody_was_faster(source: Path, destination: Path, flags: int) -> None:
        output.mkdir()
        rename(source, destination, flags)

    monkeypatch.setattr(publish, "_renameat2", somebody_was_faster)
    with pytest.raises(UserError, match="output: came into being"), atomic_folder(output) as folder:
        model(folder, "new")
    assert names(output) == []
    assert names(tmp_path) == ["output"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_that_is_a_file_is_refused(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "output").write_text("precious")
    for path in (tmp_path / "output", tmp_path / "output" / "below"):
        with pytest.raises(UserError, match=str(path)) as caught, atomic_folder(path, overwrite):
            raise AssertionError
        assert "\n" not in str(caught.value)
    assert (tmp_path / "output").read_text() == "precious"
    assert names(tmp_path) == ["output"]


def test_parent_that_refuses_is_the_users_matter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot make a folder"), atomic_folder(Path("/proc/nowhere/output")):
        raise AssertionError
    with pytest.raises(UserError, match="name too long"), atomic_folder(tmp_path / "new" / ("x" * 250)):
        raise AssertionError
    assert names(tmp_path) == []


def test_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/output")
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "link", overwrite=True) as folder:
            model(folder, content)
        assert (tmp_path / "disk" / "output" / "config.json").read_text() == content
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk") == ["output"]


def test_leftovers_go_and_what_only_looks_similar_stays(tmp_path: Path) -> None:
    similar = [
        ".output.partial-",
        ".output.partial-x.partial-00000000",
        ".xoutput.partial-00000000",
        ".output.partial-notes",
    ]
    for name in [".output.partial-0123abcd", *similar]:
        model(tmp_path / name, "left over")
    (tmp_path / ".output.partial-00000001").symlink_to("elsewhere")
    (tmp_path / ".output.partial-00000002").touch()
    with atomic_folder(tmp_path / "output"):
        assert not (tmp_path / ".output.partial-0123abcd").exists()
    assert set(names(tmp_path)) == {*similar, "output", ".output.partial-00000001", ".output.partial-00000002"}


def test_old_folder_put_aside_goes_only_when_there_is_a_new_one(tmp_path: Path) -> None:
    aside = model(tmp_path / ".output.replaced-0123abcd", "old")
    with atomic_folder(tmp_path / "output") as folder:
        model(folder, "new")
        assert aside.exists()
    with atomic_folder(tmp_path / "output", overwrite=True):
        assert not aside.exists()


def test_live_export_to_the_same_output_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with pytest.raises(UserError, match="already exists"), atomic_folder(output) as slow:  # noqa: PT012
        with atomic_folder(output) as fast:
            assert slow.exists()
            model(fast, "fast")
        model(slow, "slow")
    assert (output / "config.json").read_text() == "fast"
    assert names(tmp_path) == ["output"]


def test_folder_taken_for_a_leftover_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    lock = publish.fcntl.flock

    def cleaned_up_just_before(descriptor: int, operation: int) -> None:
        if not taken:
            taken.extend(names(tmp_path))
            (tmp_path / taken[0]).rmdir()
        lock(descriptor, operation)

    monkeypatch.setattr(publish.fcntl, "flock", cleaned_up_just_before)
    with atomic_folder(tmp_path / "output") as folder:
        assert folder.is_dir()
        model(folder, "new")
    assert names(tmp_path) == ["output"]


def test_file_system_without_locks_works_and_keeps_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish.fcntl, "flock", refuse(errno.ENOLCK))
    model(tmp_path / ".output.partial-0123abcd", "left over, or alive")
    with atomic_folder(tmp_path / "output") as folder:
        model(folder, "new")
    assert names(tmp_path) == [".output.partial-0123abcd", "output"]
