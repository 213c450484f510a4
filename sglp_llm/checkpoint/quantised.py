"""The settings of a quantisation that name modules of decoder layers, for a shortened model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sglp_llm.adapters import DecoderAdapter
from sglp_llm.errors import UserError

_ANY_INDEX = re.compile(r"\b(?:layers|h|blocks)\\*\.\(*\[*\d")


def renumbered_modules(settings: Any, adapter: DecoderAdapter, kept: Sequence[int], name: str) -> Any:
    """The same settings, in which names of modules of decoder layers follow the layers; those of removed layers are left out.

    Such names stand in lists (``modules_to_not_convert``, ``ignore``, ``targets``) and as keys (``dynamic``).

    Args:
        settings: A value of a quantisation's configuration, as in ``config.json``.
        adapter: The family's adapter.
        kept: Original indices of the kept layers, ascending.
        name: Of the model, for the message.

    Raises:
        UserError: A regular expression names layers by their index.
    """
    if isinstance(settings, Mapping):
        pairs = ((_renumbered(str(key), adapter, kept, name), value) for key, value in settings.items())
        return {key: renumbered_modules(value, adapter, kept, name) for key, value in pairs if key is not None}
    if isinstance(settings, list):
        names = [_renumbered(each, adapter, kept, name) if isinstance(each, str) else each for each in settings]
        return [
            renumbered_modules(new, adapter, kept, name)
            for old, new in zip(settings, names, strict=True)
            if new is not None or old is None
        ]
    return settings


def _renumbered(text: str, adapter: DecoderAdapter, kept: Sequence[int], name: str) -> str | None:
    """One name; ``None`` for a module of a removed layer."""
    match = adapter.layer_key_pattern.match(f"{text}.x")
    if match is None:
        if _ANY_INDEX.search(text):
            raise UserError(
                f"{name}: the quantisation's settings name layers by a pattern ({text!r}), which cannot be renumbered: write the "
                "names of the modules out"
            )
        return text
    prefix, layer, rest = match.groups()
    return f"{prefix}{kept.index(int(layer))}{rest[:-2]}" if int(layer) in kept else None
