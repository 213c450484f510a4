"""Which decoder layers of a model must stay, because others need them or transformers' cache does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglp_llm.adapters.structure.config_keys import LAYER_KINDS
from sglp_llm.adapters.structure.exceptions import Exceptions

_NO_ATTENTION = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"})
"""Entries of ``layer_types`` whose layers put no keys into the cache."""


@dataclass(frozen=True)
class Staying:
    """The limits on the layers that can be removed together.

    Attributes:
        always: Layer -> why it must stay.
        needed: Layer -> (the layers that need it, why): it must stay unless they all go.
        one_of: Layers of which one must stay, and why.
    """

    always: Mapping[int, str] = field(default_factory=dict)
    needed: Mapping[int, tuple[frozenset[int], str]] = field(default_factory=dict)
    one_of: Sequence[tuple[frozenset[int], str]] = ()

    def broken_by(self, removed: Collection[int]) -> str:
        """Why these layers cannot be removed together; empty when they can."""
        gone = set(removed)
        for layer, reason in self.always.items():
            if layer in gone:
                return f"layer {layer} must stay: {reason}"
        for layer, (readers, reason) in self.needed.items():
            if layer in gone and (left := sorted(readers - gone)):
                return f"layer {layer} must stay as long as layer {left[0]} does: {reason}"
        for layers, reason in self.one_of:
            if layers <= gone:
                return f"one of the layers {', '.join(map(str, sorted(layers)))} must stay: {reason}"
        return ""


def staying(config: Any, exceptions: Exceptions, depth: int) -> Staying:
    """The limits for one model.

    Args:
        config: The resolved configuration.
        exceptions: Those of its type.
        depth: Number of decoder layers.
    """
    always = {}
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
