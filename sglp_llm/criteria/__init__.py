"""One file a pruning criterion; the file name is its name on the command line.

A new criterion is one new file with a `CRITERION` class; the contract tests pick it up by themselves.
"""

from __future__ import annotations

from sglp_llm.criteria.base import Criterion
from sglp_llm.registry import member, member_names

__all__ = ["Criterion", "criterion_names", "get_criterion"]


def criterion_names() -> list[str]:
    """Every criterion there is, sorted."""
    return member_names(__path__)


def get_criterion(name: str) -> type[Criterion]:
    """The class of a criterion.

    Raises:
        UserError: There is none of that name; the message lists the known ones and the nearest name.
    """
    criterion: type[Criterion] = member(__name__, __path__, name, "criterion").CRITERION
    return criterion
