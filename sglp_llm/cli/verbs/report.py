"""``sglp-llm report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sglp_llm.cli.quiet import prepare


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that analyze, prune, heal or compare has written.")
    ],
) -> None:
    """Write report.html into a folder: layers, scores, similarity and gains, or the methods of a comparison, in one file."""
    prepare()
    from sglp_llm.report.html import write_report

    print(f"Written           {write_report(folder)}")
