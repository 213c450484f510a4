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
        one_of: Layers of which one must stay, and why. Two of these groups have no layer in common, or one has all of the other.
        pattern: What each layer is by its index alone, and why: a kept layer must come where one of its kind is. Without a
            pattern it is empty.
    """

    always: Mapping[int, str] = field(default_factory=dict)
    needed: Mapping[int, tuple[frozenset[int], str]] = field(default_factory=dict)
    one_of: Sequence[tuple[frozenset[int], str]] = ()
    pattern: tuple[tuple[str, ...], str] = ((), "")

    def __bool__(self) -> bool:
        return bool(self.always or self.needed or self.one_of or self.pattern[0])

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
                return f"{_one_of(layers)} must stay: {reason}"
        kinds, reason = self.pattern
        kept = [layer for layer in range(len(kinds)) if layer not in gone]
        for new, old in enumerate(kept):
            if kinds[old] != kinds[new]:
                return f"layer {old} cannot become layer {new}: {reason}"
        return ""

    def least(self, n: int, costs: Sequence[float], among: Collection[int]) -> tuple[int, ...]:
        """The n of these layers with the least sum of costs that keep the pattern; ties go to the lower layers.

        Found by dynamic programming over the layers and the number of kept ones before each.

        Raises:
            UserError: No n layers do, or the other limits forbid it.
        """
        kinds, reason = self.pattern
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # number of kept layers -> of the layers so far
        for layer, kind in enumerate(kinds):
            after: dict[int, tuple[float, tuple[int, ...]]] = {}
            for kept, (cost, removed) in best.items():
                ways = [(kept + 1, (cost, removed))] if kind == kinds[kept] else []
                if layer in among and layer not in self.always:
                    ways.append((kept, (cost + costs[layer], (*removed, layer))))
                for number, way in ways:
                    after[number] = min(way, after.get(number, way))
            best = after
        if len(kinds) - n not in best:
            raise UserError(f"drop {n}: so many layers cannot go together: {reason}")
        removed = best[len(kinds) - n][1]
        if broken := self.broken_by(removed):
            raise UserError(f"drop {n}: so many layers cannot go together: {broken}")
        return removed

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

    def windows(self, n: int, among: Sequence[int], said: str) -> list[int]:
        """The first layers of all n layers in a row that can go together.

        Args:
            n: Number of layers.
            among: Those that may be removed, ascending and without gaps.
            said: Who asks, for the message.

        Raises:
            UserError: No such layers can; the message says why the first ones cannot.
        """
        starts = [first for first in among if first + n - 1 <= among[-1]]
        if not starts:
            raise UserError(f"{said} removes {n} contiguous layers, and only {len(among)} may go")
        broken = {start: self.broken_by(range(start, start + n)) for start in starts}
        if found := [start for start in starts if not broken[start]]:
            return found
        raise UserError(f"{said} removes {n} contiguous layers, and no {n} can go: {broken[starts[0]]}")

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
            *(f"{_one_of(layers)} must stay: {reason}" for layers, reason in self.one_of),
            *([f"layers go where the others keep their order: {self.pattern[1]}"] if self.pattern[0] else []),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a plan; empty without limits."""
        parts: dict[str, Any] = {
            "always": {str(layer): reason for layer, reason in self.always.items()},
            "needed": {str(layer): [sorted(readers), reason] for layer, (readers, reason) in self.needed.items()},
            "one_of": [[sorted(layers), reason] for layers, reason in self.one_of],
            "pattern": [list(self.pattern[0]), self.pattern[1]] if self.pattern[0] else [],
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
        kinds, why = data.get("pattern") or ((), "")
        return Staying(
            {int(layer): str(reason) for layer, reason in data.get("always", {}).items()},
            {int(layer): (frozenset(by), str(reason)) for layer, (by, reason) in data.get("needed", {}).items()},
            [(frozenset(map(int, layers)), str(reason)) for layers, reason in data.get("one_of", [])],
            (tuple(map(str, kinds)), str(why)),
        )
    except (AssertionError, AttributeError, TypeError, ValueError):
        raise UserError(
            f"{where}: staying must hold always, needed, one_of and pattern as an analysis writes them"
        ) from None


def _one_of(layers: Collection[int]) -> str:
    return f"{'one of the layers' if len(layers) > 1 else 'layer'} {_listed(layers)}"


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
