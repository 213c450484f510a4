"""A folder of modules as a registry: the file name is the key, so that a new member is one new file and no edit elsewhere."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

from sglp_llm.errors import unknown


def member_names(folder: Iterable[str]) -> list[str]:
    """The members in a package's ``__path__``, sorted; ``base`` and sub-packages hold shared code and are not members."""
    return sorted(each.name for each in pkgutil.iter_modules(folder) if each.name != "base" and not each.ispkg)


def member(package: str, folder: Iterable[str], name: str, kind: str) -> ModuleType:
    """Imports one member.

    Existence is checked in the file system, so that an ImportError inside the member is not taken for a missing member.

    Args:
        package: Dotted name of the package.
        folder: Its ``__path__``.
        name: The requested member.
        kind: What a member is called in the message.

    Raises:
        UserError: There is no such member; the message lists the known ones and the nearest name.
    """
    names = member_names(folder)
    if name not in names:
        raise unknown(kind, name, names)
    return import_module(f"{package}.{name}")
