"""The error for mistakes that the user can correct."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in the user's input. The message is one line: what is wrong, where, what would be right."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a list of known names; it suggests the nearest one and shows the list.

    Args:
        kind: What the name denotes, for example ``"criterion"``.
        name: What the user wrote.
        known: Every valid name.
    """
    names = sorted(known)
    near = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    suggestion = f"; did you mean {near[0]!r}?" if near else "."
    return UserError(f"unknown {kind} {name!r}{suggestion} Known: {', '.join(names)}")
