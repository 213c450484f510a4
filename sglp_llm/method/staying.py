"""Which decoder layers must stay, because others need them or transformers' cache does, and what can go in spite of that."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglp_llm.errors import UserError


@dataclass(frozen=True)
class Staying:
    """The limits on the layers that can be removed together; without any, all can.

    Attributes:
        always: Layer -> why it must stay.
        needed: Layer -> (the layers that need it, why): it must stay unless they all go.
        one_of: Layers of which one must stay, and why.
    """

    always: Mapping[int, str] = field(default_factory=dict)
    needed: Mapping[int, tuple[frozenset[int], str]] = field(default_factory=dict)
    one_of: Sequence[tuple[frozenset[int], str]] = ()

    def __bool__(self) -> bool:
        return bool(self.always or self.needed or self.one_of)

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

    def can_follow(self, removed: Collection[int], among: Iterable[int]) -> list[int]:
        """Which of these layers can be removed next, after some that are removed."""
        return [layer for layer in among if layer not in removed and not self.broken_by({*removed, layer})]

    def following(self, removed: Collection[int], among: Iterable[int], said: str) -> list[int]:
        """The same, where it is an error that none can.

        Raises:
            UserError: None can; the message says why the first one cannot.
        """
        among = [layer for layer in among if layer not in removed]
        if found := self.can_follow(removed, among):
            return found
        reason = f": {self.broken_by({*removed, among[0]})}" if among else ""
        raise UserError(f"{said}: after {len(removed)} layers no other can go{reason}")

    def most(self, among: Iterable[int]) -> int:
        """How many of these layers can go at most."""
        layers, removed = list(among), set[int]()
        while following := self.can_follow(removed, layers):
            removed.add(following[0])
        return len(removed)

    def mended(self, wanted: Collection[int], among: Sequence[int]) -> frozenset[int] | None:
        """As many layers that can go together: of the wanted ones as many as can, then those nearest to them.

        Args:
            wanted: The layers to remove.
            among: Those that may be removed, ascending.

        Returns:
            ``None`` where so many cannot go.
        """
        removed = set[int]()
        order = sorted(among, key=lambda layer: (min(abs(layer - one) for one in wanted), layer)) if wanted else []
        while len(removed) < len(wanted):
            following = self.can_follow(removed, order)
            if not following:
                return None
            removed.add(following[0])
        return frozenset(removed)

    @property
    def lines(self) -> list[str]:
        """The limits as text, one line each."""
        return [
            *(f"layer {layer} must stay: {reason}" for layer, reason in self.always.items()),
            *(
                f"layer {layer} must stay as long as one of {_listed(readers)} does: {reason}"
                for layer, (readers, reason) in self.needed.items()
            ),
            *(f"one of the layers {_listed(layers)} must stay: {reason}" for layers, reason in self.one_of),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a plan; empty without limits."""
        parts: dict[str, Any] = {
            "always": {str(layer): reason for layer, reason in self.always.items()},
            "needed": {str(layer): [sorted(readers), reason] for layer, (readers, reason) in self.needed.items()},
            "one_of": [[sorted(layers), reason] for layers, reason in self.one_of],
        }
        return {name: part for name, part in parts.items() if part}


FREE = Staying()
"""No limits."""


def staying_from(data: object, where: str) -> Staying:
    """The limits that a plan holds.

    Raises:
        UserError: They do not have the form of `Staying.to_dict`.
    """
    if data is None:
        return FREE
    try:
        assert isinstance(data, Mapping)
        return Staying(
            {int(layer): str(reason) for layer, reason in data.get("always", {}).items()},
            {int(layer): (frozenset(by), str(reason)) for layer, (by, reason) in data.get("needed", {}).items()},
            [(frozenset(map(int, layers)), str(reason)) for layers, reason in data.get("one_of", [])],
        )
    except (AssertionError, AttributeError, TypeError, ValueError):
        raise UserError(f"{where}: staying must hold always, needed and one_of as an analysis writes them") from None


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
