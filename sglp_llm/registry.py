"""A folder of modules as a registry: the file name is the key, so that a new member is one new file and no edit elsewhere."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

from sglp_llm.errors import unknown


def member_names(folder: Iterable[str]) -> list[str]:
    """The members in a package's ``__path__``, sorted; ``base`` and sub-packages are what they share, not members."""
    return sorted(each.name for each in pkgutil.iter_modules(folder) if each.name != "base" and not each.ispkg)


def member(package: str, folder: Iterable[str], name: str, kind: str) -> ModuleType:
    """Imports one member.

    Existence is asked of the file system; an ImportError inside the member is its own and is not hidden.

    Args:
        package: Dotted name of the package.
        folder: Its ``__path__``.
        name: What the user asked for.
        kind: What a member is, for the message.

    Raises:
        UserError: There is no such member; the message lists those there are and the nearest name.
    """
    names = member_names(folder)
    if name not in names:
        raise unknown(kind, name, names)
    return import_module(f"{package}.{name}")
