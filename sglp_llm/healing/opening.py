"""Opens what healing begins with: the shortened model, its plan, and its teacher, checked before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglp_llm.analysis import open_model
from sglp_llm.checkpoint.export import check_carried
from sglp_llm.errors import UserError
from sglp_llm.models.loading import refuse_quantised
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import PLAN_FILE_NAME, Recipe, load_plan
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.processes import Processes
from sglp_llm.records import PrunePlan


@dataclass(frozen=True)
class HealingModels:
    """The models of one run.

    Attributes:
        student: The shortened model, a safetensors checkpoint that will be loaded in float32, or as it is stored where that would
            not fit.
        plan: What was removed; ``None`` where the folder holds no plan.
        teacher: The original; ``None`` without distillation.
        dtype: The one that the student's weights are held in, apart from what is trained.
    """

    student: OpenedModel
    plan: PrunePlan | None
    teacher: OpenedModel | None
    dtype: torch.dtype = torch.float32

    @contextmanager
    def unchanged_files(self) -> Iterator[None]:
        """See `OpenedModel.unchanged_files`, for both."""
        with self.student.unchanged_files(), nullcontext() if self.teacher is None else self.teacher.unchanged_files():
            yield


def open_models(
    model: str | Path, output: Path, recipe: HealingRecipe, tokenizer: Any, processes: Processes
) -> HealingModels:
    """Finds the shortened model and its teacher.

    Args:
        model: Folder of the shortened model, or its id on the Hub.
        output: Where the result will be written.
        recipe: For the teacher, and what chooses its engine.
        tokenizer: Instead of the checkpoint's own.
        processes: Those that share the work.

    Raises:
        UserError: One of them does not exist or cannot be used, they do not belong together, or the output is inside the student.
    """
    student = OpenedModel(model, None, "float32", None, tokenizer)
    assert student.source is not None
    if student.source.index is None:
        raise UserError(f"{model}: healing needs safetensors files, and this is a {student.source.format} checkpoint")
    refuse_quantised(student.source, "healing")
    student.source.check_apart(output)
    folder = student.source.path
    check_carried(folder)
    plan = load_plan(folder) if (folder / PLAN_FILE_NAME).is_file() else None
    if plan is not None and len(plan.kept) != student.num_layers:
        raise UserError(
            f"{folder / PLAN_FILE_NAME}: the plan leaves {len(plan.kept)} decoder layers, and the model has {student.num_layers}"
        )
    return HealingModels(student, plan, _teacher(student, plan, recipe, processes) if recipe.distil else None)


def _teacher(student: OpenedModel, plan: PrunePlan | None, recipe: HealingRecipe, processes: Processes) -> OpenedModel:
    name, revision = recipe.teacher, None
    if name is None:
        if plan is None or plan.source is None:
            raise UserError(
                f"{student.identity.name}: no sglp_plan.json names the original model: give --teacher, or --no-teacher"
            )
        name, revision = plan.source.name, plan.revision
    # Memory is predicted for a pass that looks at hidden states alone, as storing the teacher's logits does.
    settings = Recipe(
        criterion="bi",
        revision=revision,
        samples=1,
        seq_len=recipe.seq_len,
        engine=recipe.engine,
        scratch=recipe.scratch,
    )
    teacher = open_model(name, settings, processes=processes)
    if plan is not None and plan.source is not None and teacher.identity.fingerprint != plan.source.fingerprint:
        raise UserError(
            f"the teacher {name} is not the model that the plan was made for ({plan.source.name}, "
            f"{plan.source.fingerprint[:23]}...)"
        )
    ours, theirs = int(student.text_config.vocab_size), int(teacher.text_config.vocab_size)
    if ours != theirs:
        raise UserError(f"the teacher {name} has a vocabulary of {theirs} tokens, and the student one of {ours}")
    return teacher
