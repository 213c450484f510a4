"""Reads the text of a training, which the original model may have written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from sglp_llm.analysis.opening import self_file
from sglp_llm.calibration import TrainingSequences, calibration_set, mixture, training_sequences
from sglp_llm.calibration.answers import answered
from sglp_llm.calibration.cache import cache_folder
from sglp_llm.calibration.chat import holds_conversations
from sglp_llm.calibration.packing import hash_of
from sglp_llm.calibration.specs import SELF, parse_source
from sglp_llm.compensation import NONE
from sglp_llm.errors import UserError
from sglp_llm.healing.opening import HealingModels
from sglp_llm.plan import Recipe
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.progress import Progress

_MOST_HELD_OUT = 64  # sequences; more say no more about which weights are best
_PIECE = 16  # consecutive tokens that two texts do not share by chance


class NotTrained(UserError):
    """A shortened model stays as it is: text to learn from is missing, or nothing better was learned from it."""


def read_text(
    models: HealingModels, recipe: HealingRecipe, steps: int | None, progress: Progress
) -> tuple[TrainingSequences, range, int]:
    """The sequences, those of them that are held out (the last ones), and the number of steps.

    Raises:
        UserError: The text cannot be read, there is less of it than asked for, or its tokens are not the model's.
        NotTrained: There is too little of it to hold a sequence out.
    """
    if recipe.answers == "teacher":
        _check_answered(models, recipe)
    if steps is None and recipe.tokens is not None:
        steps = _steps(recipe, recipe.tokens)
    wanted = None if steps is None else steps * recipe.sequences
    held = None if wanted is None else _held_out(recipe, wanted)
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
    fitted = _fitted_text(models, recipe)
    more = 0 if fitted is None or wanted is None else -(-fitted.numel() // recipe.seq_len)
    lengths: list[int | None] = [None] if number is None else [number + more, number]
    if recipe.repeat or recipe.minutes:
        lengths += _less_text(recipe, number)  # which is seen more than once
    sequences, length = _first_that_is_there(read, lengths, recipe.seq_len)
    if length is None or (number is not None and length < number):
        held = wanted = None
    models.student.check_tokens(sequences.input_ids)
    count = len(sequences.input_ids)
    if held is None:
        held = _held_out(recipe, count)
    if count - held < 1:
        raise NotTrained(
            f"{sequences.source}: {count} sequences of {recipe.seq_len} tokens are too few to hold one out"
        )
    sequences = _held_out_last(sequences, held, wanted, fitted)
    count = len(sequences.input_ids)
    if steps is None:
        assert recipe.epochs is not None
        steps = max(1, round(recipe.epochs * (count - held) / recipe.sequences))
    return replace(sequences, source=label or sequences.source), range(count - held, count), steps


def check_text(recipe: HealingRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Reads as much text as the recipe needs, where that is known without the models.

    Raises:
        UserError: There is less of it.
    """
    if recipe.tokens is None or recipe.repeat or _is_written(recipe):
        return
    wanted = _steps(recipe, recipe.tokens) * recipe.sequences
    tokens = (wanted + _held_out(recipe, wanted)) * recipe.seq_len
    training_sequences(tokenizer, recipe.data, tokens=tokens, seq_len=recipe.seq_len, seed=recipe.seed)


def _is_written(recipe: HealingRecipe) -> bool:
    """Whether the original writes some of the text."""
    return recipe.answers == "teacher" or _has_self(recipe)


def _has_self(recipe: HealingRecipe) -> bool:
    return any(portion.source == SELF for portion in mixture(recipe.data))


def _steps(recipe: HealingRecipe, tokens: int) -> int:
    return max(1, round(tokens / (recipe.sequences * recipe.seq_len)))


def _held_out(recipe: HealingRecipe, sequences: int) -> int:
    return max(1, min(_MOST_HELD_OUT, round(recipe.held_out * sequences)))


def _less_text(recipe: HealingRecipe, sequences: int | None) -> list[int | None]:
    """Numbers of sequences to ask for where there is too little text: all of it, or ever less of a mixture."""
    if len(mixture(recipe.data)) == 1:
        return [None]
    return [] if sequences is None else [sequences >> half for half in range(1, sequences.bit_length() - 1)]


def _first_that_is_there(
    read: Callable[..., TrainingSequences], lengths: Sequence[int | None], seq_len: int
) -> tuple[TrainingSequences, int | None]:
    """The first of some numbers of sequences that the text is long enough for; ``None`` is all of it."""
    for length in lengths[:-1]:
        try:
            return read(tokens=None if length is None else length * seq_len), length
        except UserError:
            continue
    return read(tokens=None if lengths[-1] is None else lengths[-1] * seq_len), lengths[-1]


def _fitted_text(models: HealingModels, recipe: HealingRecipe) -> torch.Tensor | None:
    """The calibration sequences that a compensation was fitted on, ``[n, tokens]``, where they are of the training text."""
    settings = {} if models.plan is None else models.plan.settings
    if settings.get("compensate", NONE) == NONE or settings.get("calibration") != recipe.data:
        return None
    # What a model writes, it would have to write first.
    if _is_written(recipe):
        return None
    samples, seq_len, seed = (settings.get(name) for name in ("samples", "seq_len", "seed"))
    if not (isinstance(samples, int) and isinstance(seq_len, int) and isinstance(seed, int)):
        return None  # another program's plan
    return calibration_set(models.student.tokenizer, recipe.data, samples=samples, seq_len=seq_len, seed=seed).input_ids


def _held_out_last(
    sequences: TrainingSequences, held: int, wanted: int | None, fitted: torch.Tensor | None
) -> TrainingSequences:
    """The sequences that come last in their sources behind all others, of which ``wanted`` are kept.

    Text that the removal was fitted on would judge what is learned afterwards too strictly: what shares text with it is held out
    only where there is nothing else.
    """
    order = sequences.positions.argsort(stable=True).tolist()
    if fitted is not None:
        known = {piece for row in fitted for piece in _pieces(row, 1)}
        shared = [not known.isdisjoint(_pieces(row, _PIECE // 2)) for row in sequences.input_ids]
        order.sort(key=lambda index: not shared[index])
    judging = set(order[len(order) - held :])
    rest = [index for index in range(len(order)) if index not in judging]
    chosen = [*rest[:wanted], *sorted(judging)]
    input_ids, labels = sequences.input_ids[chosen], sequences.labels[chosen]
    return replace(
        sequences,
        input_ids=input_ids,
        labels=labels,
        positions=sequences.positions[chosen],
        hash=hash_of(input_ids, labels),
    )


def _pieces(row: torch.Tensor, step: int) -> Iterator[bytes]:
    """Consecutive tokens of a sequence, beginning at every ``step``-th place."""
    data = row.numpy().astype("<i8")
    for first in range(0, max(1, len(data) - _PIECE + 1), step):
        yield data[first : first + _PIECE].tobytes()


def _written_text(
    models: HealingModels, recipe: HealingRecipe, sequences: int | None, progress: Progress
) -> Path | None:
    """The text that the original writes, where the recipe's data are ``self`` or a mixture with it."""
    if not _has_self(recipe):
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
