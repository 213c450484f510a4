"""Returns the `Staying` of a model: which of its layers must stay by its configuration and its type's exceptions."""

from __future__ import annotations

from typing import Any

from sglp_llm.adapters import DecoderAdapter
from sglp_llm.adapters.structure.config_keys import LAYER_KINDS
from sglp_llm.adapters.structure.exceptions import Exceptions
from sglp_llm.adapters.structure.wrappers import pinned_by_vision, text_config
from sglp_llm.method.staying import Staying

_NO_ATTENTION = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"})
"""Entries of ``layer_types`` whose layers put no keys into the cache."""


def staying_of(config: Any, adapter: DecoderAdapter, depth: int) -> Staying:
    """The limits for one model.

    Args:
        config: The resolved configuration, of a wrapper the whole one.
        adapter: Its adapter.
        depth: Number of decoder layers.
    """
    exceptions, always, config = adapter.exceptions, pinned_by_vision(config), text_config(config)
    if exceptions.pin_first:
        always[0] = exceptions.pin_first
    if exceptions.pin_last:
        always[depth - 1] = exceptions.pin_last
    return Staying(always, _needed(config, exceptions, depth), _attention(config, depth))


def _needed(config: Any, exceptions: Exceptions, depth: int) -> dict[int, tuple[frozenset[int], str]]:
    readers: dict[int, set[int]] = {}
    reason = ""
    if exceptions.readers is not None:
        key, reading, computing = exceptions.readers
        kinds, reason = getattr(config, key, None) or [], f"later layers use what it computes ({key})"
        for layer, kind in enumerate(kinds):
            before = [other for other in range(layer) if kinds[other] == computing]
            if kind == reading and before:
                readers.setdefault(before[-1], set()).add(layer)
    if exceptions.shared_from and (shared := int(getattr(config, exceptions.shared_from, None) or 0)):
        kinds, reason = config.layer_types, f"later layers share its keys and values ({exceptions.shared_from})"
        for layer in range(depth - shared, depth):
            before = [other for other in range(depth - shared) if kinds[other] == kinds[layer]]
            if before:
                readers.setdefault(before[-1], set()).add(layer)
    return {layer: (frozenset(by), reason) for layer, by in readers.items()}


def _attention(config: Any, depth: int) -> list[tuple[frozenset[int], str]]:
    """In a hybrid one layer with attention must stay: from its keys the cache knows how many tokens it holds."""
    for key in LAYER_KINDS:
        kinds = getattr(config, key, None)
        if isinstance(kinds, list | tuple) and len(kinds) == depth:
            attending = frozenset(layer for layer, kind in enumerate(kinds) if kind not in _NO_ATTENTION)
            if attending and len(attending) < depth:
                return [(attending, "without any attention the cache does not know how many tokens it holds")]
    return []
