"""What a checkpoint carries: regular files of its own, or of the Hub's cache; everything else is refused before work begins."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import copied, run_cli, save_tiny

from sglp_llm.checkpoint import push as pushing
from sglp_llm.errors import UserError
from sglp_llm.small_files import carried_files, copy_file


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "plain")


def link(target: str) -> Callable[[Path], None]:
    return lambda file: file.symlink_to(target)


def unix_socket(file: Path) -> None:
    here = Path.cwd()
    os.chdir(file.parent)  # the path of a socket may be only 107 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(file.name)
    finally:
        os.chdir(here)


BAD = {
    "password file": (link("/etc/passwd"), "a link out of the folder"),
    "environment": (link("/proc/self/environ"), "a link out of the folder"),
    "endless": (link("/dev/zero"), "this is a device"),
    "broken": (link("nowhere"), "No such file or directory): mend or remove it"),
    "loop": (link("NOTICE"), "mend or remove it"),
    "pipe": (os.mkfifo, "this is a pipe"),
    "socket": (unix_socket, "this is a socket"),
    "huge": (lambda file: os.truncate(file.touch() or file, 2**40), "too many to be copied"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_files_are_refused_before_anything_is_written(plain: Path, tmp_path: Path, case: str) -> None:
    make, expected = BAD[case]
    source = copied(plain, tmp_path / "source", lambda folder: make(folder / "NOTICE"))
    outcome = run_cli("prune", source, "--plan", "2,4", "-o", tmp_path / "out", "--no-verify")
    assert (outcome.code, expected in outcome.error) == (2, True), outcome.err
    assert "NOTICE" in outcome.error
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_links_out_of_folders_that_are_carried_are_refused(plain: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.jinja").write_text("secret")

    def damage(folder: Path) -> None:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "deeper").symlink_to(secret)

    source = copied(plain, tmp_path / "source", damage)
    outcome = run_cli("prune", source, "--plan", "2,4", "-o", tmp_path / "out", "--no-verify")
    assert outcome.code == 2
    assert "a link out of the folder" in outcome.error


def test_links_inside_the_folder_are_followed(plain: Path, tmp_path: Path) -> None:
    source = copied(plain, tmp_path / "source")
    (source / "licences").mkdir()
    (source / "licences" / "apache").write_text("Apache")
    (source / "LICENSE").symlink_to("licences/apache")
    assert run_cli("prune", source, "--plan", "2,4", "-o", tmp_path / "out", "--no-verify").code == 0
    assert not (tmp_path / "out" / "LICENSE").is_symlink()
    assert (tmp_path / "out" / "LICENSE").read_text() == "Apache"


def cached(folder: Path, blob: str) -> Path:
    """A snapshot as the Hub's cache stores it: links into the repository's blobs."""
    repository = folder / "models--someone--model"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "0123").write_text("blob")
    commit = repository / "snapshots" / "abc"
    commit.mkdir(parents=True)
    (commit / "LICENSE").symlink_to(blob)
    return commit


def test_the_blobs_of_the_hubs_cache_are_copied(tmp_path: Path) -> None:
    commit = cached(tmp_path, "../../blobs/0123")
    (tmp_path / "out").mkdir()
    (found,) = carried_files(commit, ("LICENSE*",))
    copy_file(found, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "blob"


def test_other_files_of_the_cache_are_not(tmp_path: Path) -> None:
    (tmp_path / "models--someone--other" / "blobs").mkdir(parents=True)
    (tmp_path / "models--someone--other" / "blobs" / "0123").write_text("private")
    commit = cached(tmp_path, "../../../models--someone--other/blobs/0123")
    with pytest.raises(UserError, match="a link out of the folder"):
        carried_files(commit, ("LICENSE*",))


def test_nothing_from_outside_the_folder_is_published(plain: Path, tmp_path: Path) -> None:
    folder = copied(plain, tmp_path / "folder", lambda folder: (folder / "notes.txt").symlink_to("/etc/passwd"))
    with pytest.raises(UserError, match=r"notes\.txt: a link out of the folder"):
        pushing.published_files(folder, "someone/model")
