"""``sglp-llm ls``."""

from __future__ import annotations

from typing import Annotated

import typer

from sglp_llm.cli.completion import LISTS, one_of
from sglp_llm.cli.options import Json, Quiet
from sglp_llm.cli.quiet import prepare


def list_members(
    what: Annotated[str, typer.Argument(metavar="WHAT", help=f"{', '.join(LISTS)}.", autocompletion=one_of(LISTS))],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List what is available: model families, criteria, compensations, presets, recipes, healing recipes, suites."""
    console = prepare(quiet)
    from sglp_llm.cli.catalog import catalog

    title, columns, rows = catalog(what)
    if as_json:
        console.print_json({what: [dict(zip(columns, row, strict=True)) for row in rows]})
    else:
        console.print_table(title, columns, rows)
