"""Command lines of sglp-llm, taken apart by its own parser without being run."""

from __future__ import annotations

from functools import lru_cache

import typer
from typer.core import TyperGroup

from sglp_llm.cli.main import app


@lru_cache(maxsize=1)
def program() -> TyperGroup:
    """The program with its verbs."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    return command


def parse(words: list[str]) -> str:
    """Parses the words after ``sglp-llm``; returns the verb, which is empty for the program's own options.

    Raises:
        Exception: Typer's usage error: there is no such verb or option, or a value has the wrong type.
    """
    group = program()
    context = group.make_context("sglp-llm", list(words), resilient_parsing=False)
    with context:
        rest = [*context._protected_args, *context.args]
        if not rest:
            return ""
        name, verb, arguments = group.resolve_command(context, rest)
        assert verb is not None
        with verb.make_context(name, arguments, parent=context):
            return str(name)
