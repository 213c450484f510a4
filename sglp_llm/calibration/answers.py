"""Conversations whose answers a model writes: the questions of a data set, without its answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from sglp_llm.calibration.chat import (
    Conversation,
    Turn,
    conversations,
    holds_conversations,
    question,
    tokenised,
    turns_of,
)
from sglp_llm.calibration.packing import adds_bos, shuffled, tokenise
from sglp_llm.calibration.sampling import Sampler
from sglp_llm.calibration.specs import parse_source
from sglp_llm.calibration.written import Row, written_rows
from sglp_llm.errors import UserError
from sglp_llm.models.loading import DecoderModel
from sglp_llm.progress import Progress, silent
from sglp_llm.tensor_files.tensors import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answered(
    model: DecoderModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: str,
    *,
    tokens: int | None,
    seq_len: int,
    seed: int = 0,
    batch_size: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    folder: Path,
    progress: Progress = silent,
) -> Path:
    """Lets a model answer the first question of conversations, in seeded random order; a file that exists already is reused.

    Questions that fill more than half of ``seq_len`` are left out, and answers end where it is full.

    Args:
        model: The model, with the whole of it in memory.
        tokenizer: The model's own; its chat template renders the questions, or Alpaca's prompt if it has none.
        spec: A source that holds conversations: ``alpaca`` or ``chat:FILE``.
        tokens: Least number of tokens of all conversations; ``None`` = every question is answered once.
        seq_len: Most tokens of a question with its answer.
        seed: Seed of the order and of the sampling.
        batch_size: Answers generated at once; the text depends on it.
        temperature: Sampling temperature.
        top_p: Share of the probability for nucleus sampling; 1 = all tokens.
        folder: Folder of the file; created if it is missing.
        progress: Reports the tokens.

    Returns:
        A JSONL file with ``messages``, or Alpaca's fields, one conversation a line, for ``chat:FILE``.

    Raises:
        UserError: The source holds no conversations or no question that fits, it cannot be read, a setting is out of range, or
            the model is streamed.
    """
    source = parse_source(spec)
    if not holds_conversations(source):
        raise UserError(f"answers: {spec!r} holds no conversations: name alpaca or chat:FILE")
    sampler = Sampler(model, tokenizer, seq_len, batch_size, temperature, top_p)

    def questions() -> Iterator[tuple[tuple[Turn, ...], list[int]]]:
        for conversation in shuffled(conversations(source, "train"), random.Random(seed)):
            asked = tuple(takewhile(lambda turn: turn.role != "assistant", conversation.turns))
            if asked:
                ids = tokenise(tokenizer, question(tokenizer, Conversation(asked, conversation.where)))
                if len(start) + len(ids) <= seq_len // 2:
                    yield asked, [*start, *ids]

    start = [int(tokenizer.bos_token_id)] if adds_bos(tokenizer) else []
    coming, reached = questions(), 0

    def batch(number: int) -> list[Row]:
        nonlocal reached
        chosen = list(islice(coming, (number - reached) * batch_size, (number - reached + 1) * batch_size))
        reached = number + 1
        if not chosen:
            if number == 0:
                raise UserError(f"answers: {spec} has no question that fits into half of {seq_len} tokens")
            return []
        new = sampler.continued([ids for _, ids in chosen], number, seed)
        return [_row(asked, sampler.text(more)) for (asked, _), more in zip(chosen, new, strict=True)]

    def size(row: Row) -> int:
        turns = turns_of(row, spec)
        return len(tokenised(tokenizer, Conversation(turns, spec))[0]) if turns[-1].content.strip() else 0

    questions_of = source.label("train") if source.path is None else sha256_of(source.path)
    digest = sampler.digest(questions=questions_of, tokens=tokens, seed=seed)
    return written_rows(folder, f"{model.model.config.model_type}-{digest}", batch, size, tokens, progress)


def _row(asked: tuple[Turn, ...], answer: str) -> Row:
    if [turn.role for turn in asked] == ["user"]:
        return {"instruction": asked[0].content, "input": asked[0].context, "output": answer}
    messages = [{"role": turn.role, "content": turn.content} for turn in asked]
    return {"messages": [*messages, {"role": "assistant", "content": answer}]}
