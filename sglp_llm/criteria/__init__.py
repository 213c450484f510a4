"""Returns how important each decoder layer is, or which set of layers to remove. Start with `base.py`, then `bi.py`.

One file per criterion; the file name is its name on the command line. To add one, add a file with a `CRITERION` class; the
contract tests then cover it automatically.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from sglp_llm.criteria.base import Criterion, GreedyCriterion, ScoreCriterion, SetCriterion
from sglp_llm.errors import unknown
from sglp_llm.plan.yaml_files import converted
from sglp_llm.registry import member, member_names

__all__ = [
    "Criterion",
    "GreedyCriterion",
    "ScoreCriterion",
    "SetCriterion",
    "criterion_names",
    "get_criterion",
    "make_criterion",
]


def criterion_names() -> list[str]:
    """The names of all criteria, sorted."""
    return member_names(__path__)


def get_criterion(name: str) -> type[Criterion]:
    """The class of a criterion.

    Raises:
        UserError: No criterion has that name; the message lists the known names and the closest one.
    """
    criterion: type[Criterion] = member(__name__, __path__, name, "criterion").CRITERION
    return criterion


def make_criterion(name: str, num_layers: int, seed: int = 0, options: Mapping[str, Any] | None = None) -> Criterion:
    """Creates a criterion with its options.

    Args:
        name: Its name.
        num_layers: Number of decoder layers.
        seed: Random seed.
        options: The criterion's own settings, by name.

    Raises:
        UserError: There is no such criterion or option, or the option's value is not valid.
    """
    criterion = get_criterion(name)
    parameters = inspect.signature(criterion).parameters.values()
    known = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    hints = get_type_hints(criterion.__init__)
    given = {}
    for option, value in (options or {}).items():
        if option not in known:
            raise unknown(f"option of the criterion {name}", option, known or ["(it has none)"])
        given[option] = converted(value, hints[option], f"{name}.{option}")
    return criterion(num_layers, seed, **given)
