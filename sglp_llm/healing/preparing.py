"""Prepares a training: the batch, the teacher, the number of steps, the text, and what a resumed run must match."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from sglp_llm.calibration import TrainingSequences
from sglp_llm.errors import UserError
from sglp_llm.healing.opening import HealingModels
from sglp_llm.healing.planning import (
    Train,
    batch_size_that_fits,
    batch_that_runs,
    fitting_train,
    footprint,
    in_bfloat16,
    least_batch,
    steps_in,
    try_batch,
)
from sglp_llm.healing.teacher import OnlineTeacher, Teacher, store_teacher
from sglp_llm.healing.trained import Trained
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.processes import Processes
from sglp_llm.progress import Progress
from sglp_llm.small_files import read_text, replace_text
from sglp_llm.trials import Journal

_STEPS_FILE_NAME = "steps"
_TRAIN_FILE_NAME = "train"


def sequences_of(recipe: HealingRecipe, processes: Processes) -> int:
    """Sequences of one step: the recipe's, and at least one for every process."""
    return max(recipe.sequences, processes.count)


def check_batch(recipe: HealingRecipe, processes: Processes) -> None:
    """Refuses, before any work is done, a step that cannot be divided into equal batches.

    Raises:
        UserError: It cannot.
    """
    each, sequences = least_batch(recipe) * processes.count, sequences_of(recipe, processes)
    if sequences % each:
        raise UserError(
            f"sequences: the {sequences} of a step are not a multiple of {processes.count} processes x "
            f"batch_size {least_batch(recipe)}"
        )


def work_folder_of(output: Path) -> Path:
    """Where a run keeps what it resumes from."""
    return output.with_name(f"{output.name}.healing")


def work_folder(output: Path, resume: bool) -> Path:
    """Where a run keeps what it resumes from; before a run it exists after an interruption only.

    Raises:
        UserError: It exists and is not to be resumed, or the other way round.
    """
    work = work_folder_of(output)
    if work.exists() and not resume:
        raise UserError(f"{work} holds an interrupted run: give --resume to go on with it, or remove the folder")
    if resume and not work.exists():
        raise UserError(f"{work}: there is no interrupted run to resume")
    return work


def with_train_chosen(models: HealingModels, recipe: HealingRecipe, work: Path, processes: Processes) -> HealingRecipe:
    """The recipe with a decision about what is trained: that of the interrupted run, or by memory.

    Args:
        models: The models; the student is in memory.
        recipe: The settings.
        work: The folder of the run, which may not exist.
        processes: All decide alike.
    """
    if recipe.train != "auto":
        return recipe
    kept = work / _TRAIN_FILE_NAME
    names = get_args(Train)
    chosen = read_text(kept) if kept.exists() else fitting_train(models, recipe)
    # An interrupted run that was given another choice is refused by its settings.
    index = names.index(chosen) if chosen in names else names.index("full")
    return replace(recipe, train=names[processes.agreed(index)])


def timed_steps(
    models: HealingModels,
    recipe: HealingRecipe,
    trained: Trained,
    teacher: OnlineTeacher | None,
    batch_size: int,
    work: Path,
    processes: Processes,
) -> int | None:
    """The steps of a run that is limited in time: those of the interrupted run, or what timing says; ``None`` for others.

    Raises:
        UserError: There is not time enough for one step.
    """
    if recipe.minutes is None:
        return None
    kept = work / _STEPS_FILE_NAME
    if kept.exists():
        return int(read_text(kept))
    steps = steps_in(60 * recipe.minutes, trained.model, teacher, recipe, batch_size, models.student.text_config)
    return processes.agreed(steps)


def teacher_in_memory(
    models: HealingModels, recipe: HealingRecipe, trained: Trained, processes: Processes
) -> tuple[OnlineTeacher | None, int]:
    """The teacher in memory, where the recipe wants it there or it is predicted to fit, and the sequences computed at once."""
    predicted = footprint(models, recipe, trained.parameters)
    beside = models.teacher is not None and not recipe.store and not models.teacher.streamed
    if recipe.store is None:
        beside = beside and predicted.fits(least_batch(recipe), True)
    beside = processes.agreed(int(beside)) > 0
    batch_size = least_batch(recipe)
    if recipe.batch_size == "auto":
        batch_size = processes.agreed(batch_size_that_fits(predicted, recipe.sequences // processes.count, beside))
    teacher = None
    if beside:
        assert models.teacher is not None
        teacher = OnlineTeacher(models.teacher.load(), recipe.top_k, recipe.temperature, in_bfloat16(recipe))
    if recipe.batch_size == "auto" and torch.cuda.is_available():
        # A prediction can be wrong, and a graphics processor, unlike the host, says in time that its memory is full.
        attempt = partial(try_batch, trained.model, teacher, recipe, config=models.student.text_config)
        sizes = torch.zeros(processes.count, dtype=torch.float64)
        sizes[processes.index] = batch_that_runs(attempt, batch_size)
        batch_size = int(processes.sum(sizes).min())
    return teacher, batch_size


def check_may_be_stored(recipe: HealingRecipe) -> None:
    """Refuses to go on without the teacher in memory where the recipe needs it there.

    Raises:
        UserError: It does.
    """
    for key in ("hidden_weight", "on_policy"):
        if getattr(recipe, key):
            raise UserError(
                f"{key} needs the teacher in memory, and it is predicted not to fit: leave it out, or give --online-teacher"
            )


def begin(work: Path, models: HealingModels, sequences: TrainingSequences, recipe: HealingRecipe, steps: int) -> None:
    """Makes the work folder, or refuses to go on with a run of other models, text or settings.

    Raises:
        UserError: The folder holds another run.
    """
    work.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in recipe.to_dict().items() if key not in ("batch_size", "engine", "scratch")}
    teacher = None if models.teacher is None else models.teacher.identity.fingerprint
    Journal(
        work / "setting",
        {**models.student.setting, "teacher": teacher, "data_hash": sequences.hash, **settings, "steps": steps},
    )
    replace_text(work / _STEPS_FILE_NAME, str(steps))
    replace_text(work / _TRAIN_FILE_NAME, recipe.train)


def teacher_on_disk(
    models: HealingModels,
    recipe: HealingRecipe,
    sequences: TrainingSequences,
    work: Path,
    progress: Progress,
    processes: Processes,
) -> Teacher | None:
    """The teacher's most likely tokens on disk; ``None`` without a teacher.

    Raises:
        UserError: The folder holds those of another teacher or other sequences.
    """
    if models.teacher is None:
        return None
    assert recipe.top_k is not None
    # Its engine was chosen before the student was in memory.
    is_open = recipe.engine == "auto" and models.teacher.can_stream and not models.teacher.streamed
    if processes.agreed(int(is_open and not footprint(models, recipe, 0).fits(1, True))):
        models.teacher.stream(recipe.scratch)
    teacher = store_teacher(
        models.teacher.load(),
        sequences.input_ids,
        work / "teacher",
        top_k=recipe.top_k,
        temperature=recipe.temperature,
        identity=models.teacher.setting,
        progress=progress,
        processes=processes,
    )
    models.teacher.release()
    return teacher
