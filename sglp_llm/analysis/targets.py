"""What a budget of a target means for one model: its parameters, or the memory that it takes."""

from __future__ import annotations

from functools import partial

from sglp_llm.errors import UserError
from sglp_llm.method.selection import Target
from sglp_llm.plan import Recipe
from sglp_llm.records import Budget, Footprint
from sglp_llm.sizes import parse_bytes, show_bytes

LONGEST_DEFAULT = 4096
"""The largest context that is taken where none is named: a long one of the configuration is rarely used."""


def wanted(recipe: Recipe, footprint: Footprint | None) -> Budget | Target:
    """How much to remove, in the form that `sglp_llm.method.selection` uses.

    Args:
        recipe: For the budget and the context.
        footprint: What the model takes in memory; needed with a target only.
    """
    budget = recipe.budget
    if budget.target_params is not None:
        assert footprint is not None
        return Target(
            said=f"target_params {budget.target_params:,}",
            limit=budget.target_params,
            left=footprint.params_without,
            show=lambda count: f"{count:,} parameters are left",
        )
    if budget.target_memory is not None:
        assert footprint is not None
        context = context_of(recipe.context, footprint)
        return Target(
            said=f"target_memory {budget.target_memory}",
            limit=parse_bytes(budget.target_memory),
            left=partial(footprint.bytes_without, context=context),
            show=lambda count: (
                f"weights and a KV cache of {context:,} tokens take {show_bytes(int(count))} ({count:,} bytes)"
            ),
        )
    return budget


def context_of(given: int | None, footprint: Footprint) -> int:
    """The given context, or the model's longest one, `LONGEST_DEFAULT` at most."""
    return given or min(footprint.positions or LONGEST_DEFAULT, LONGEST_DEFAULT)


def check_context(recipe: Recipe, positions: int | None, name: str) -> None:
    """Refuses a context that is longer than the model's, or that the budget does not use.

    Args:
        recipe: The settings.
        positions: The longest context of the model; ``None`` without a limit.
        name: Of the model.

    Raises:
        UserError: It is one of these.
    """
    if recipe.context is None:
        return
    if recipe.target_memory is None:
        raise UserError("context is for the KV cache that target_memory counts: leave it out, or give target_memory")
    if positions is not None and recipe.context > positions:
        raise UserError(f"context {recipe.context} is longer than the {positions} positions that {name} has")
