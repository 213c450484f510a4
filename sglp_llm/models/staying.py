"""Returns the `Staying` of a model: which of its layers must stay by its configuration and its type's exceptions."""

from __future__ import annotations

import math
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
    one_of = _attention(config, depth)
    if exceptions.sharing is not None:
        key, entry = exceptions.sharing
        sharing = [layer for layer, kind in enumerate(getattr(config, key)) if kind == entry]
        if exceptions.numbers_sharing:
            always |= dict.fromkeys(
                sharing, f"it shares weights with the other {entry} layers, which are counted ({key})"
            )
        else:
            always |= dict.fromkeys(sharing[:1], f"it holds the weights that all {entry} layers share ({key})")
            one_of.append((frozenset(sharing[1:]), f"transformers builds no model with a single {entry} layer ({key})"))
    return Staying(always, _needed(config, exceptions, depth), one_of, _pattern(config, exceptions, depth))


def _pattern(config: Any, exceptions: Exceptions, depth: int) -> tuple[tuple[str, ...], str]:
    """What each layer is by its index, where only that says it."""
    if not exceptions.regular:
        return (), ""
    pairs = [(getattr(config, period), getattr(config, offset)) for period, offset in exceptions.regular]
    kinds = tuple("".join("01"[layer % period == offset] for period, offset in pairs) for layer in range(depth))
    periods = " and ".join(f"{key} {period}" for (key, _), (period, _) in zip(exceptions.regular, pairs, strict=True))
    most = math.lcm(*(period for period, _ in pairs))
    return kinds, f"transformers builds a layer by its index ({periods}); {most} layers in a row can go, and last ones"


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
