"""Hidden states behind the cuts: which decoder layers' outputs are to agree, and what they are in a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sglp_llm.engine.modes import leaving_states
from sglp_llm.errors import UserError
from sglp_llm.healing.teacher import OnlineTeacher
from sglp_llm.healing.trained import seams_of
from sglp_llm.models.loading import DecoderModel
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.records import PrunePlan

Pairs = tuple[tuple[int, int], ...]
"""Decoder layers whose outputs are compared: the student's, and the teacher's."""


def matched_layers(plan: PrunePlan | None, recipe: HealingRecipe) -> Pairs:
    """For every cut the last layer that is trained behind it, or the one before it, and the teacher's layer that it stands for.

    That is the layer in front of the next kept one: the student's state there enters the same layer as the teacher's.

    Args:
        plan: What was removed.
        recipe: Its ``hidden_weight`` says whether states are compared at all.

    Raises:
        UserError: They are to be compared, and no cut is known that has a layer before it.
    """
    if not recipe.hidden_weight:
        return ()
    if plan is None:
        raise UserError("hidden_weight: there is no sglp_plan.json in the folder that says where the cuts are")
    around = recipe.train in ("seam", "partial") and recipe.seam_side != "before"
    behind = recipe.seam_layers if around else 0
    entered = sorted({min(seam + behind, len(plan.kept)) for seam in seams_of(plan)} - {0})
    if not entered:
        raise UserError("hidden_weight: the first layers are missing, and no layer before the cut can make up for them")
    bounds = [*plan.kept, plan.num_layers]
    return tuple((index - 1, bounds[index] - 1) for index in entered)


@dataclass(frozen=True)
class Matched:
    """Decoder layers whose outputs are to agree, front to back; none where hidden states are not compared."""

    student: tuple[nn.Module, ...] = ()
    teacher: tuple[nn.Module, ...] = ()


NOTHING_MATCHED = Matched()


def matched_in(student: DecoderModel, teacher: OnlineTeacher | None, pairs: Pairs) -> Matched:
    """The layers themselves, of both models in memory."""
    if not pairs:
        return NOTHING_MATCHED
    assert teacher is not None
    ours, theirs = zip(*pairs, strict=True)
    return Matched(
        tuple(student.layers[index] for index in ours), tuple(teacher.model.layers[index] for index in theirs)
    )


@contextmanager
def outputs_of(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The hidden states that leave some decoder layers, in the layers' order, filled in by a forward pass inside the block."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(leaving_states(output))

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
