"""The end of a verb that publishes what it has written."""

from __future__ import annotations

import sys
from pathlib import Path

from sglp_llm.cli.quiet import say
from sglp_llm.errors import UserError


def check_push(repo: str | None, private: bool) -> None:
    """Refuses, before any work is done, options that no upload could follow.

    Raises:
        UserError: ``--private`` without a repository, a name that cannot be one, or nobody is logged in.
    """
    if repo is None:
        if private:
            raise UserError("--private is about the Hub repository: give --push-to-hub REPO too")
        return
    from sglp_llm.models.upload import check_repository

    check_repository(repo)


def push_finished(folder: Path, repo: str, private: bool, as_json: bool) -> None:
    """Uploads the folder and prints where it is; with ``as_json`` stdout is left to the verb's own object."""
    from sglp_llm.checkpoint.push import push

    address = push(folder, repo, private=private, notify=notify).address
    print(f"Uploaded          {address}", file=sys.stderr if as_json else sys.stdout)


def notify(line: str) -> None:
    """Tells who waits at a terminal why."""
    if sys.stderr.isatty():
        say(line)
