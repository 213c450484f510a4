"""What of a plan, a recipe or a record may be published: everything but paths of the machine that it was made on.

In the files of a local folder paths stay, because ``heal`` finds the original model by them. What is shown to others (model
card, report) or sent to others (`sglp_llm.checkpoint.push`) has the last part of a path only, or the Hub id where it is known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLACE = "path/to/this/folder"
"""Stands for the model in the commands of a model card, until it is uploaded and has a name."""

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_IN_HUB_CACHE = re.compile(r"/models--([\w.-]+?)(?:--([\w.-]+?))?/snapshots/([0-9a-f]{40})/?$")

# A file after its form, up to the next source of a mixture: the names of folders may hold spaces.
_IN_FORM = re.compile(r"((?:^|\s)(?:text|jsonl|chat|task):)(?:(?!\s[\w-]+:).)*/")
# An absolute path, or one from ~, . or .., inside other text. "and/or" and addresses are none.
_IN_TEXT = re.compile(r"(?<![^\s\"'(\[=,])(?:~|\.{1,2})?/(?=\S)(?:[^\s/,;'\"()\[\]]+/)*")
_WHOLE = re.compile(r"(?:~|\.{1,2})?/[^\n]*")

_MODELS = ("model", "teacher")
_FOLDERS = ("journal", "scratch")


def without_paths(text: str) -> str:
    """Of every path in a text only its last part stays; Hub ids and addresses stay as they are."""
    if _WHOLE.fullmatch(text) and not re.search(r"\s[\w-]+:", text):
        return last_part(text)
    return _IN_TEXT.sub("", _IN_FORM.sub(r"\1", text))


def without_local_paths(value: Any, key: str = "") -> Any:
    """A copy of plain data in which no text holds a path of this machine.

    Args:
        value: What JSON or YAML holds.
        key: The key that it stands under; it says what a relative path is.
    """
    if isinstance(value, Mapping):
        plain = {name: without_local_paths(each, str(name)) for name, each in value.items()}
        if isinstance(value.get("name"), str) and "fingerprint" in value:  # a `ModelIdentity`
            plain["name"] = published_model(value["name"])
        if found := in_hub_cache(_original(value)):
            plain["revision"] = value.get("revision") or found[1]
        return plain
    if isinstance(value, list | tuple):
        return [without_local_paths(each, key) for each in value]
    if not isinstance(value, str):
        return value
    if key in _MODELS:
        return published_model(value)
    return last_part(value) if key in _FOLDERS else without_paths(value)


def published_model(name: str) -> str:
    """The Hub id of a model, or the last part of its path."""
    if found := in_hub_cache(name):
        return found[0]
    if HUB_ID.fullmatch(name) and not Path(name).exists():
        return name
    return last_part(name)


def in_hub_cache(name: str) -> tuple[str, str] | None:
    """Hub id and commit of a folder in the Hub's cache; ``None`` for any other name."""
    found = _IN_HUB_CACHE.search(name)
    return found and ("/".join(filter(None, found.group(1, 2))), found[3])


def _original(data: Mapping[str, Any]) -> str:
    """The model that a plan (``source``) or a recipe (``model``) names; empty in other data."""
    source = data.get("source", data.get("model"))
    name = source.get("name") if isinstance(source, Mapping) else source
    return name if isinstance(name, str) else ""


def last_part(path: str) -> str:
    """The name of a file or folder, also where the path ends in ``..``."""
    name = Path(path).name
    return name if name not in ("", "..") else Path(path).resolve().name
