"""`heal` trains a shortened model until it predicts more nearly what the original predicts, and writes the result."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglp_llm.analysis import software_versions
from sglp_llm.analysis.opening import self_file
from sglp_llm.calibration import TrainingSequences, check_spec, mixture, training_sequences
from sglp_llm.calibration.specs import SELF
from sglp_llm.checkpoint import atomic_folder, check_output
from sglp_llm.checkpoint.verify import expected_logits, verify_checkpoint
from sglp_llm.errors import UserError
from sglp_llm.healing.keeping import Run, Training
from sglp_llm.healing.opening import Pupils, open_models
from sglp_llm.healing.planning import batch_size_that_fits, footprint, has_fast_bfloat16, steps_in
from sglp_llm.healing.records import HealingRecord, HealReport
from sglp_llm.healing.teacher import OnlineTeacher, Teacher, store_teacher
from sglp_llm.healing.trained import Trained, check_peft, make_trainable
from sglp_llm.healing.training import train
from sglp_llm.healing.writing import export, write_papers
from sglp_llm.plan import Recipe
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent, timed
from sglp_llm.trials import Journal

if TYPE_CHECKING:
    pass

DEFAULT_TOKENS = 128_000
DEFAULT_TOP_K = 100

_STEPS_FILE_NAME = "steps"
_MOST_HELD_OUT = 64  # sequences; more say no more about which weights are best


def heal(
    model: str | Path,
    output: str | Path,
    *,
    recipe: HealingRecipe | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    verify: bool = True,
    keep_adapter: bool = False,
    resume: bool = False,
    report_to: tuple[str, ...] = (),
    progress: Progress = silent,
    processes: Processes = ALONE,
    **settings: Any,
) -> HealReport:
    """Trains a shortened model and writes it; names and shapes of all tensors stay.

    While it runs, checkpoints are kept in ``OUTPUT.healing`` beside the output; they are removed when it is written.

    Args:
        model: Folder of the shortened model, or its id on the Hub.
        output: Folder to write.
        recipe: The settings; the defaults are `HealingRecipe`'s, with 128,000 tokens.
        tokenizer: Instead of the checkpoint's own.
        overwrite: Replace an output that exists.
        verify: Reload the result with plain transformers and compare it with what was trained.
        keep_adapter: With LoRA, write peft's adapter beside the merged weights, in ``adapter/``.
        resume: Go on from the last checkpoint of a run that was interrupted.
        report_to: transformers' names of experiment trackers, such as ``tensorboard``.
        progress: Called with the tokens that are done.
        processes: Those that share every step (`current_processes`); the main one writes.
        **settings: Single settings that replace the recipe's: ``tokens=20_000``, ``train="lora"``, ...

    Raises:
        UserError: Something in the models, the text or the settings is wrong, or training made nothing better.
        VerificationError: The reload check failed; nothing is left at ``output``.
    """
    output = Path(output).expanduser()
    seconds: dict[str, float] = {}
    recipe = (recipe or HealingRecipe()).with_changes(**settings)
    if recipe.tokens is recipe.minutes is recipe.epochs is None:
        recipe = replace(recipe, tokens=DEFAULT_TOKENS)
    with processes.failing_together():
        check_output(output, overwrite)
        check_spec(recipe.data)
        check_peft(recipe)
        check_batch(recipe, processes)
        if keep_adapter and recipe.train != "lora":
            raise UserError(f"keep_adapter is about LoRA, and train is {recipe.train}: leave it out")
        work = _work_folder(output, resume)
        models = open_models(model, output, recipe, tokenizer, processes)
        decoder = models.student.load()
        trained = make_trainable(decoder, recipe, models.plan)
        with timed(seconds, "teacher"):
            online, batch_size = _online(models, recipe, trained, processes)
        if models.teacher is not None and online is None:
            recipe = replace(recipe, store=True, top_k=recipe.top_k or DEFAULT_TOP_K)
        steps = _steps(models, recipe, trained, online, batch_size, work, processes)
        with timed(seconds, "text"):
            sequences, held_out, steps = _text(models, recipe, steps, progress)
        _begin(work, models, sequences, recipe, steps)
        with timed(seconds, "teacher"):
            teacher = online or _stored(models, recipe, sequences, work, progress, processes)
        run = Run(work, batch_size, _bfloat16(recipe), resume, report_to, progress, processes)
        with timed(seconds, "training"):
            training = train(trained, teacher, sequences, held_out, recipe, steps, run)
    record = _record(models, sequences, held_out, recipe, trained, training)
    if not processes.is_main:
        return HealReport(str(output), record, training.log, 0, None, seconds)
    if training.best_step == 0:
        shutil.rmtree(work, ignore_errors=True)  # going on would end in the same way
        reason = training.stopped or "the held-out loss never fell"
        raise UserError(
            f"healing made nothing better ({reason}): lower learning_rate, or give other text; nothing is written"
        )
    del teacher, online
    if models.teacher is not None:
        models.teacher.release()
    with atomic_folder(output, overwrite) as folder:
        with timed(seconds, "export"):
            if keep_adapter:
                trained.save_adapter(folder / "adapter")
            values = export(models, trained, folder, progress)
            write_papers(models, folder, record, recipe, work)
        verification = None
        if verify:
            with timed(seconds, "reload check"):
                ids = sequences.input_ids[held_out.start : held_out.stop]
                expected = expected_logits(decoder, (), ids, values)
                found = verify_checkpoint(folder, expected, torch.float32, decoder.input_device)
                verification = asdict(found)
        written = sum(file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors")
    shutil.rmtree(work, ignore_errors=True)
    return HealReport(str(output), record, training.log, written, verification, seconds)


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


def _work_folder(output: Path, resume: bool) -> Path:
    """Where a run keeps what it goes on from; it is there after an interruption only."""
    work = output.with_name(f"{output.name}.healing")
    if work.exists() and not resume:
        raise UserError(f"{work} holds an interrupted run: give --resume to go on with it, or remove the folder")
    if resume and not work.exists():
        raise UserError(f"{work}: there is no interrupted run to resume")
    return work


def _steps(
    models: Pupils,
    recipe: HealingRecipe,
    trained: Trained,
    teacher: OnlineTeacher | None,
    batch_size: int,
    work: Path,
    processes: Processes,
) -> int | None:
    """The steps of a run that is limited in time: those of the interrupted run, or what timing says; ``None`` for others."""
    if recipe.minutes is None:
        return None
    kept = work / _STEPS_FILE_NAME
    if kept.exists():
        return int(kept.read_text(encoding="utf-8"))
    steps = steps_in(60 * recipe.minutes, trained.model, teacher, recipe, batch_size, models.student.config)
    return _agreed(steps, processes)


def _online(
    models: Pupils, recipe: HealingRecipe, trained: Trained, processes: Processes
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
    return OnlineTeacher(models.teacher.load(), recipe.top_k, recipe.temperature, _bfloat16(recipe)), batch_size


def _bfloat16(recipe: HealingRecipe) -> bool:
    return has_fast_bfloat16() if recipe.dtype == "auto" else recipe.dtype == "bfloat16"


def _agreed(number: int, processes: Processes) -> int:
    """The main process's number, in all processes."""
    return int(processes.sum(torch.tensor(float(number if processes.is_main else 0), dtype=torch.float64)))


def _text(
    models: Pupils, recipe: HealingRecipe, steps: int | None, progress: Progress
) -> tuple[TrainingSequences, range, int]:
    """The sequences, those of them that are held out (the last ones), and the number of steps."""
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
        if recipe.minutes is None:
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


def _written_text(models: Pupils, recipe: HealingRecipe, sequences: int | None, progress: Progress) -> Path | None:
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


def _begin(work: Path, models: Pupils, sequences: TrainingSequences, recipe: HealingRecipe, steps: int) -> None:
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


def _stored(
    models: Pupils,
    recipe: HealingRecipe,
    sequences: TrainingSequences,
    work: Path,
    progress: Progress,
    processes: Processes,
) -> Teacher | None:
    """The teacher's most likely tokens on disk; ``None`` without a teacher."""
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


def _record(
    models: Pupils,
    sequences: TrainingSequences,
    held_out: range,
    recipe: HealingRecipe,
    trained: Trained,
    training: Training,
) -> HealingRecord:
    return HealingRecord(
        student=models.student.identity,
        teacher=None if models.teacher is None else models.teacher.identity,
        data=sequences.source,
        data_hash=sequences.hash,
        sequences=len(sequences.input_ids) - len(held_out),
        held_out=len(held_out),
        tokens=training.best_step * recipe.sequences * recipe.seq_len,
        steps=training.steps,
        best_step=training.best_step,
        parameters=trained.parameters,
        before=training.before,
        after=training.after,
        stopped=training.stopped,
        settings=recipe.to_dict(),
        versions=software_versions(),
    )
