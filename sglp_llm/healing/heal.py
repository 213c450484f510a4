"""`heal` trains a shortened model until it predicts more nearly what the original predicts, and writes the result."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sglp_llm.analysis import software_versions
from sglp_llm.calibration import TrainingSequences, check_spec, named_text
from sglp_llm.checkpoint import atomic_folder, check_output, remove_folder
from sglp_llm.checkpoint.lock import lock_beside, only_run
from sglp_llm.checkpoint.verify import expected_logits, verify_checkpoint
from sglp_llm.errors import UserError, disk_of
from sglp_llm.healing.keeping import Run, Training
from sglp_llm.healing.matching import matched_in, matched_layers
from sglp_llm.healing.opening import HealingModels, open_models
from sglp_llm.healing.planning import in_bfloat16, with_weights_that_fit
from sglp_llm.healing.preparing import (
    begin,
    check_batch,
    check_may_be_stored,
    sequences_of,
    teacher_in_memory,
    teacher_on_disk,
    timed_steps,
    with_train_chosen,
    work_folder,
    work_folder_of,
)
from sglp_llm.healing.reading import NotTrained, check_text, read_text
from sglp_llm.healing.trained import Trained, check_peft, make_trainable
from sglp_llm.healing.training import train
from sglp_llm.healing.writing import export, write_papers
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent, timed
from sglp_llm.records import HealingRecord, HealReport

DEFAULT_TOKENS = 128_000
DEFAULT_TOP_K = 100


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
        UserError: Something in the models, the text or the settings is wrong; another run writes the output; the disk is full; or
            the models' files have changed meanwhile.
        NotTrained: Training made nothing better, or there is too little text to see whether it does.
        VerificationError: The reload check failed; nothing is left at ``output``.
    """
    output = Path(output).expanduser()
    seconds: dict[str, float] = {}
    recipe = _with_length((recipe or HealingRecipe()).with_changes(**settings))
    with ExitStack() as held:
        with processes.failing_together(), disk_of(work_folder_of(output)), ExitStack() as files:
            check_output(output, overwrite)
            if processes.is_main:
                held.enter_context(only_run(lock_beside(output), output))
            recipe = replace(recipe, data=named_text(recipe.data))
            check_healing(recipe, processes)
            recipe = replace(recipe, sequences=sequences_of(recipe, processes))
            if keep_adapter and recipe.train == "auto":
                recipe = replace(recipe, train="lora")
            if keep_adapter and recipe.train != "lora":
                raise UserError(f"keep_adapter is about LoRA, and train is {recipe.train}: leave it out")
            work = work_folder(output, resume)
            models = open_models(model, output, recipe, tokenizer, processes)
            models = with_weights_that_fit(models, recipe, processes)
            files.enter_context(models.unchanged_files())
            decoder = models.student.load()
            recipe = with_train_chosen(models, recipe, work, processes)
            pairs = matched_layers(models.plan, recipe)
            trained = make_trainable(decoder, recipe, models.plan)
            with timed(seconds, "teacher"):
                online, batch_size = teacher_in_memory(models, recipe, trained, processes)
            if models.teacher is not None and online is None:
                check_may_be_stored(recipe)
                recipe = replace(recipe, store=True, top_k=recipe.top_k or DEFAULT_TOP_K)
            steps = timed_steps(models, recipe, trained, online, batch_size, work, processes)
            with timed(seconds, "text"):
                sequences, held_out, steps = read_text(models, recipe, steps, progress)
            begin(work, models, sequences, recipe, steps)
            with timed(seconds, "teacher"):
                teacher = online or teacher_on_disk(models, recipe, sequences, work, progress, processes)
            run = Run(work, batch_size, in_bfloat16(recipe), resume, report_to, progress, processes)
            with timed(seconds, "training"):
                matched = matched_in(decoder, online, pairs)
                training = train(trained, teacher, sequences, held_out, recipe, steps, run, matched)
        record = _record(models, sequences, held_out, recipe, trained, training)
        if training.best_step == 0:
            if processes.is_main:
                remove_folder(work, output)  # going on would end in the same way
            reason = training.stopped or "the held-out loss never fell"
            raise NotTrained(
                f"healing made nothing better ({reason}): lower learning_rate, or give other text; nothing is written"
            )
        if not processes.is_main:
            return HealReport(str(output), record, training.log, 0, None, seconds)
        del teacher, online
        if models.teacher is not None:
            models.teacher.release()
        with atomic_folder(output, overwrite) as folder, models.student.unchanged_files():
            with timed(seconds, "export"):
                if keep_adapter:
                    trained.save_adapter(folder / "adapter")
                values = export(models, trained, folder, progress)
                write_papers(models, folder, record, recipe, work)
            verification = None
            if verify:
                with timed(seconds, "reload check"):
                    ids = sequences.input_ids[held_out.start : held_out.stop]
                    decoder.model.to(models.dtype)
                    expected = expected_logits(decoder, (), ids, values)
                    # Where there was no room for the student in float32, there may be none for a second one.
                    narrow = models.dtype != torch.float32
                    found = verify_checkpoint(folder, expected, models.dtype, decoder.input_device, streamed=narrow)
                    verification = asdict(found)
            written = sum(file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors")
        remove_folder(work, output)
        return HealReport(str(output), record, training.log, written, verification, seconds)


def _with_length(recipe: HealingRecipe) -> HealingRecipe:
    """The recipe, with the default number of tokens where it does not say when training ends."""
    if recipe.tokens is recipe.minutes is recipe.epochs is None:
        return replace(recipe, tokens=DEFAULT_TOKENS)
    return recipe


def check_training_text(recipe: HealingRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses too little text before any work is done, where what is needed can be known.

    Raises:
        UserError: There is less than the recipe asks for.
    """
    check_text(replace(_with_length(recipe), data=named_text(recipe.data)), tokenizer)


def check_healing(recipe: HealingRecipe, processes: Processes = ALONE) -> None:
    """Refuses settings that cannot be trained with, before any work is done.

    Raises:
        UserError: The text cannot be read, peft is missing, or a step cannot be divided between the processes.
    """
    check_spec(recipe.data)
    check_peft(recipe)
    check_batch(recipe, processes)


def _record(
    models: HealingModels,
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
