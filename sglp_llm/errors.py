"""The error for mistakes that the user can correct."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MOST_CHARACTERS = 280
"""The longest message; what comes from files and options may have any length, and would fill a screen."""

_KEPT_AT_THE_END = 110


class UserError(ValueError):
    """A mistake in the user's input. The message is one line: what is wrong, where, what would be right."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a list of known names; it suggests the nearest one and shows the list.

    Args:
        kind: What the name denotes, for example ``"criterion"``.
        name: What the user wrote.
        known: Every valid name.
    """
    names, name = sorted(known), str(name)
    near = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    suggestion = f"; did you mean {near[0]!r}?" if near else "."
    return UserError(f"unknown {kind} {name!r}{suggestion} Known: {', '.join(names)}")


def one_line(message: str) -> str:
    """The message as one line of at most `MOST_CHARACTERS`, without what a terminal would take for a command.

    Its beginning says what is wrong, and its end what would be right: the middle of a longer one is left out.
    """
    text = " ".join(message.split())
    if not text.isprintable():
        text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[: MOST_CHARACTERS - _KEPT_AT_THE_END - 5]} ... {text[-_KEPT_AT_THE_END:]}"
