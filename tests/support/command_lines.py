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
    if words[0].startswith("-"):  # parsing these would carry them out: --install-completion writes files
        known = {name for parameter in group.params for name in parameter.opts} | {"-h", "--help"}
        assert words[0] in known, f"no such option: {words[0]}"
        return ""
    context = group.make_context("sglp-llm", list(words))
    with context:
        name, verb, arguments = group.resolve_command(context, [*context._protected_args, *context.args])
        assert verb is not None
        with verb.make_context(name, arguments, parent=context):
            return str(name)
