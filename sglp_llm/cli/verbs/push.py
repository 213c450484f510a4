"""``sglp-llm push``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sglp_llm.cli import panels
from sglp_llm.cli.options import Json, Quiet
from sglp_llm.cli.pushing import notify
from sglp_llm.cli.quiet import prepare


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that prune or heal has written.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub; created where it is needed.")],
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Branch, created where it is needed. Default: the main one.",
            rich_help_panel=panels.HUB,
        ),
    ] = None,
    private: Annotated[bool, typer.Option(help="Create the repository private.", rich_help_panel=panels.HUB)] = False,
    message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Of the commit.", rich_help_panel=panels.HUB)
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Upload a checkpoint to the Hub in one commit, without the paths of this machine."""
    prepare(quiet)
    from sglp_llm.checkpoint.push import push

    done = push(folder, repo, revision=revision, private=private, message=message, notify=notify)
    print(json.dumps(asdict(done)) if as_json else f"Uploaded          {done.address}")
