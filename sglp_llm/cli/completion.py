"""Names that a shell completes as values of options. They are read from folders, without the imports of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from sglp_llm.registry import member_names

LISTS = ("adapters", "criteria", "compensations", "presets", "recipes", "healing-recipes", "suites")
"""What ``sglp-llm ls`` knows."""

_Complete = Callable[[str], list[str]]


def one_of(names: Sequence[str]) -> _Complete:
    """Completes to one of the names."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def a_criterion(incomplete: str) -> list[str]:
    """Completes the name of a criterion."""
    return one_of(["sglp", *_members("criteria")])(incomplete)


def a_compensation(incomplete: str) -> list[str]:
    """Completes the name of a compensation."""
    return one_of(["none", *_members("compensation")])(incomplete)


def a_preset(incomplete: str) -> list[str]:
    """Completes the name of a preset."""
    from sglp_llm.plan.shipped import preset_names

    return one_of(preset_names())(incomplete)


def a_recipe(incomplete: str) -> list[str]:
    """Completes the name of a recipe."""
    from sglp_llm.plan.shipped import shipped_recipes

    return one_of(list(shipped_recipes()))(incomplete)


def a_healing_recipe(incomplete: str) -> list[str]:
    """Completes the name of a healing recipe."""
    from sglp_llm.plan.shipped import shipped_healing_recipes

    return one_of(list(shipped_healing_recipes()))(incomplete)


def a_suite(incomplete: str) -> list[str]:
    """Completes the name of a suite."""
    from sglp_llm.plan.shipped import shipped_suites

    return one_of(list(shipped_suites()))(incomplete)


def _members(room: str) -> list[str]:
    spec = find_spec(f"sglp_llm.{room}")
    assert spec is not None
    return member_names(spec.submodule_search_locations or ())
