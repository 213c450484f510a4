"""Reads the text of a training, which the original model may have written."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from sglp_llm.analysis.opening import self_file
from sglp_llm.calibration import TrainingSequences, mixture, training_sequences
from sglp_llm.calibration.answers import answered
from sglp_llm.calibration.cache import cache_folder
from sglp_llm.calibration.chat import holds_conversations
from sglp_llm.calibration.specs import SELF, parse_source
from sglp_llm.errors import UserError
from sglp_llm.healing.opening import HealingModels
from sglp_llm.plan import Recipe
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.progress import Progress

_MOST_HELD_OUT = 64  # sequences; more say no more about which weights are best


def read_text(
    models: HealingModels, recipe: HealingRecipe, steps: int | None, progress: Progress
) -> tuple[TrainingSequences, range, int]:
    """The sequences, those of them that are held out (the last ones), and the number of steps.

    Raises:
        UserError: The text cannot be read, there is too little of it, or its tokens are not the model's.
    """
    if recipe.answers == "teacher":
        _check_answered(models, recipe)
    step_tokens = recipe.sequences * recipe.seq_len
    if steps is None and recipe.tokens is not None:
        steps = max(1, round(recipe.tokens / step_tokens))
    wanted = None if steps is None else steps * recipe.sequences
    held = None if wanted is None else max(1, min(_MOST_HELD_OUT, round(recipe.held_out * wanted)))
    number = None if wanted is None or held is None else wanted + held
    data, label = recipe.data, None
    if recipe.answers == "teacher":
        data, label = f"chat:{_answers(models, recipe, number, progress)}", f"{data}, answered by the teacher"
    read = partial(
        training_sequences,
        models.student.tokenizer,
        data,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        self_file=_written_text(models, recipe, number, progress),
        progress=progress,
    )
    try:
        sequences = read(tokens=None if number is None else number * recipe.seq_len)
    except UserError:
        if not (recipe.repeat or recipe.minutes) or len(mixture(recipe.data)) > 1:
            raise
        # All that there is, more than once.
        sequences, held = read(tokens=None), None
    sequences = replace(sequences, source=label or sequences.source)
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


def _check_answered(models: HealingModels, recipe: HealingRecipe) -> None:
    portions = mixture(recipe.data)
    if len(portions) > 1 or not holds_conversations(parse_source(portions[0].source)):
        raise UserError(f"answers: data {recipe.data!r} is not one source of conversations: give alpaca or chat:FILE")
    assert models.teacher is not None
    if models.teacher.streamed:
        raise UserError("answers: to write them the whole teacher must be in memory, and it is predicted not to fit")


def _answers(models: HealingModels, recipe: HealingRecipe, sequences: int | None, progress: Progress) -> Path:
    """The conversations of the recipe's data, answered by the teacher: enough for a number of sequences, ``None`` = all."""
    assert models.teacher is not None
    return answered(
        models.teacher.load(),
        models.student.tokenizer,
        mixture(recipe.data)[0].source,
        tokens=None if sequences is None else (sequences + 1) * recipe.seq_len,  # the last sequence may not be full
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        folder=cache_folder("answers"),
        progress=progress,
    )
