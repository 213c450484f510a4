"""Prepares a training: the batch, the teacher, the number of steps, the text, and what a resumed run must match."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from sglp_llm.analysis.opening import self_file
from sglp_llm.calibration import TrainingSequences, mixture, training_sequences
from sglp_llm.calibration.specs import SELF
from sglp_llm.errors import UserError
from sglp_llm.healing.opening import HealingModels
from sglp_llm.healing.planning import batch_size_that_fits, footprint, has_fast_bfloat16, steps_in
from sglp_llm.healing.teacher import OnlineTeacher, Teacher, store_teacher
from sglp_llm.healing.trained import Trained
from sglp_llm.plan import Recipe
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.processes import Processes
from sglp_llm.progress import Progress
from sglp_llm.trials import Journal

_STEPS_FILE_NAME = "steps"
_MOST_HELD_OUT = 64  # sequences; more say no more about which weights are best


def check_batch(recipe: HealingRecipe, processes: Processes) -> None:
    """Refuses, before any work is done, a step that cannot be divided into equal batches.

    Raises:
        UserError: It cannot.
    """
    each = (recipe.batch_size or 1) * processes.count
    if recipe.sequences % each:
        raise UserError(
            f"sequences: the {recipe.sequences} of a step are not a multiple of {processes.count} processes x "
            f"batch_size {recipe.batch_size or 1}"
        )


def work_folder(output: Path, resume: bool) -> Path:
    """Where a run keeps what it resumes from; before a run it exists after an interruption only.

    Raises:
        UserError: It exists and is not to be resumed, or the other way round.
    """
    work = output.with_name(f"{output.name}.healing")
    if work.exists() and not resume:
        raise UserError(f"{work} holds an interrupted run: give --resume to go on with it, or remove the folder")
    if resume and not work.exists():
        raise UserError(f"{work}: there is no interrupted run to resume")
    return work


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
        return int(kept.read_text(encoding="utf-8"))
    steps = steps_in(60 * recipe.minutes, trained.model, teacher, recipe, batch_size, models.student.config)
    return _agreed(steps, processes)


def teacher_in_memory(
    models: HealingModels, recipe: HealingRecipe, trained: Trained, processes: Processes
) -> tuple[OnlineTeacher | None, int]:
    """The teacher in memory, where the recipe wants it there or it is predicted to fit, and the sequences computed at once."""
    predicted = footprint(models, recipe, trained.parameters)
    beside = models.teacher is not None and not recipe.store and not models.teacher.streamed
    if recipe.store is None:
        beside = beside and predicted.fits(recipe.batch_size or 1, True)
    beside = _agreed(int(beside), processes) > 0
    batch_size = recipe.batch_size
    if batch_size is None:
        batch_size = _agreed(batch_size_that_fits(predicted, recipe.sequences // processes.count, beside), processes)
    if not beside:
        return None, batch_size
    assert models.teacher is not None
    return OnlineTeacher(models.teacher.load(), recipe.top_k, recipe.temperature, in_bfloat16(recipe)), batch_size


def in_bfloat16(recipe: HealingRecipe) -> bool:
    return has_fast_bfloat16() if recipe.dtype == "auto" else recipe.dtype == "bfloat16"


def _agreed(number: int, processes: Processes) -> int:
    """The main process's number, in all processes."""
    return int(processes.sum(torch.tensor(float(number if processes.is_main else 0), dtype=torch.float64)))


def read_text(
    models: HealingModels, recipe: HealingRecipe, steps: int | None, progress: Progress
) -> tuple[TrainingSequences, range, int]:
    """The sequences, those of them that are held out (the last ones), and the number of steps.

    Raises:
        UserError: The text cannot be read, there is too little of it, or its tokens are not the model's.
    """
    step_tokens = recipe.sequences * recipe.seq_len
    if steps is None and recipe.tokens is not None:
        steps = max(1, round(recipe.tokens / step_tokens))
    wanted = None if steps is None else steps * recipe.sequences
    held = None if wanted is None else max(1, min(_MOST_HELD_OUT, round(recipe.held_out * wanted)))
    number = None if wanted is None or held is None else wanted + held
    read = partial(
        training_sequences,
        models.student.tokenizer,
        recipe.data,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        self_file=_written_text(models, recipe, number, progress),
        progress=progress,
    )
    try:
        sequences = read(tokens=None if number is None else number * recipe.seq_len)
    except UserError:
        if recipe.minutes is None or len(mixture(recipe.data)) > 1:
            raise
        # Time for more than there is: all of it, more than once.
        sequences, held = read(tokens=None), None
    models.student.check_tokens(sequences.input_ids)
    count = len(sequences.input_ids)
    if held is None:
        held = max(1, min(_MOST_HELD_OUT, round(recipe.held_out * count)))
    if count - held < 1:
        raise UserError(f"{sequences.source}: {count} sequences of {recipe.seq_len} tokens are too few to hold one out")
    if steps is None:
        assert recipe.epochs is not None
        steps = max(1, round(recipe.epochs * (count - held) / recipe.sequences))
    return sequences, range(count - held, count), steps


def _written_text(
    models: HealingModels, recipe: HealingRecipe, sequences: int | None, progress: Progress
) -> Path | None:
    """The text that the original writes, where the recipe's data are ``self`` or a mixture with it."""
    if all(portion.source != SELF for portion in mixture(recipe.data)):
        return None
    if models.teacher is None:
        raise UserError(
            f"data {recipe.data!r}: the original model writes the text: leave out --no-teacher, or name another"
        )
    if sequences is None:
        raise UserError(f"data {recipe.data!r}: text that a model writes has no end: give tokens, not epochs")
    settings = Recipe(
        calibration=recipe.data, samples=sequences, seq_len=recipe.seq_len, seed=recipe.seed, engine=recipe.engine
    )
    return self_file(models.teacher, settings, progress)


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
    (work / _STEPS_FILE_NAME).write_text(str(steps), encoding="utf-8")


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
