"""Texts and conversations -> training sequences with labels."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sglp_llm.calibration.chat import conversations, holds_conversations, tokenised
from sglp_llm.calibration.mixtures import Portion, Spec, mixture, shares
from sglp_llm.calibration.packing import SEPARATOR, adds_bos, check_length, hash_of, shuffled, token_stream, tokenise
from sglp_llm.calibration.specs import parse_source
from sglp_llm.calibration.texts import load_documents, source_label
from sglp_llm.errors import UserError
from sglp_llm.progress import Advance, Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_PREDICTED = -100
"""The label that the losses of transformers and torch ignore."""

Piece = tuple[list[int], list[bool] | None]
"""Consecutive token ids, and which of them are predicted; ``None`` means all."""


@dataclass(frozen=True)
class TrainingSequences:
    """Sequences to train on, in a seeded random order.

    Attributes:
        input_ids: ``[n, seq_len]``, int64.
        labels: ``[n, seq_len]``, int64: the token ids, not shifted, as transformers expects them, or `NOT_PREDICTED`.
        source: The specification, with splits and weights.
        positions: ``[n]`` float64 from 0 to 1: how far into what was read of its source each sequence is.
        hash: sha256, in hex, of shape, ids and labels: the same on every machine for the same sequences.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    source: str
    positions: torch.Tensor
    hash: str


def training_sequences(
    tokenizer: PreTrainedTokenizerBase,
    spec: Spec,
    *,
    tokens: int | None,
    seq_len: int,
    seed: int = 0,
    answers_only: bool = True,
    self_file: Path | None = None,
    progress: Progress = silent,
) -> TrainingSequences:
    """Packs documents into sequences without padding, shuffled and joined as for a calibration set.

    Sources are streamed: each is read only as far as its share needs. Conversations (``alpaca``, ``chat:FILE``) are rendered by
    the tokenizer's chat template, or in Alpaca's prompt if it has none. Sequences in which no token is predicted are left out.

    Args:
        tokenizer: The model's own.
        spec: One source, see `sglp_llm.calibration.load_documents`, or several, see `mixture`; ``train`` is the default split.
        tokens: Number of tokens in all, rounded up to whole sequences; ``None`` means all of a single source, without the last,
            partial sequence.
        seq_len: Tokens per sequence, the BOS token included if the tokenizer adds one to every text.
        seed: Seed of the order of documents and of sequences.
        answers_only: Whether in conversations only the assistant's turns are predicted; in plain text every token is.
        self_file: The file for ``self``, from `sglp_llm.calibration.self_text`.
        progress: Reports the tokens read.

    Raises:
        UserError: A number is too small, a source cannot be read or has too little text, or all of a mixture was asked for.
    """
    if tokens is not None and tokens < 1:
        raise UserError(f"tokens is {tokens}; at least 1 is needed")
    check_length("seq_len", seq_len)
    portions = mixture(spec)
    if tokens is None and len(portions) > 1:
        raise UserError(
            f"{source_label(portions, 'train')}: a mixture needs a number of tokens to share; give one, or name one source"
        )
    total = None if tokens is None else -(-tokens // seq_len)
    counts = [None] if total is None else shares(portions, total)
    parts = []
    with progress("Reading", (total or 0) * seq_len) as advance:
        for portion, count in zip(portions, counts, strict=True):
            if count != 0:
                pieces = _pieces(tokenizer, portion, seed, answers_only, self_file)
                parts.append(_windows(tokenizer, pieces, portion, count, seq_len, advance))
    positions = torch.cat([(torch.arange(len(ids), dtype=torch.float64) + 0.5) / max(1, len(ids)) for ids, _ in parts])
    input_ids, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    order = list(range(len(input_ids)))
    random.Random(seed).shuffle(order)
    input_ids, labels = input_ids[order], labels[order]
    source = source_label(portions, "train")
    return TrainingSequences(input_ids, labels, source, positions[order], hash_of(input_ids, labels))


def _pieces(
    tokenizer: PreTrainedTokenizerBase, portion: Portion, seed: int, answers_only: bool, self_file: Path | None
) -> Iterator[Piece]:
    """The tokens of one source, its documents in seeded random order."""
    source, rng = parse_source(portion.source), random.Random(seed)
    if not holds_conversations(source):
        documents = shuffled(load_documents(portion.source, "train", tokenizer, self_file), rng)
        for ids in token_stream(tokenizer, documents):
            yield ids, None
        return
    between = tokenise(tokenizer, SEPARATOR)
    for number, conversation in enumerate(shuffled(conversations(source, "train"), rng)):
        ids, answers = tokenised(tokenizer, conversation)
        if number:
            ids, answers = between + ids, [False] * len(between) + answers
        yield ids, answers if answers_only else None


def _windows(
    tokenizer: PreTrainedTokenizerBase,
    pieces: Iterator[Piece],
    portion: Portion,
    count: int | None,
    seq_len: int,
    advance: Advance,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``count`` sequences of a source and their labels, both ``[count, seq_len]``; all of them for ``None``."""
    bos = adds_bos(tokenizer)
    body = seq_len - bos
    found: list[torch.Tensor] = []  # ids and labels, [2, windows, seq_len]
    rest = torch.empty(2, 0, dtype=torch.int64)
    windows = read = 0
    for ids, predicted in pieces:
        read += len(ids)
        piece = torch.tensor([ids, ids], dtype=torch.int64)
        if predicted is not None:
            piece[1, ~torch.tensor(predicted, dtype=torch.bool)] = NOT_PREDICTED
        rest = torch.cat([rest, piece], dim=1)
        whole = rest.shape[1] // body * body
        cut = rest[:, :whole].reshape(2, -1, body)
        rest = rest[:, whole:]
        if bos:
            front = torch.full((2, cut.shape[1], 1), int(tokenizer.bos_token_id), dtype=torch.int64)
            front[1] = NOT_PREDICTED if predicted is not None else front[1]
            cut = torch.cat([front, cut], dim=2)
        # The first token of a sequence is never predicted.
        cut = cut[:, (cut[1, :, 1:] != NOT_PREDICTED).any(dim=1)]
        new = cut.shape[1] if count is None else min(cut.shape[1], count - windows)
        found.append(cut[:, :new])
        windows += new
        advance(new * seq_len)
        if windows == count:
            break
    if windows < (count or 1):
        raise _too_little(portion, count or 1, seq_len, body, windows, read)
    input_ids, labels = torch.cat(found, dim=1)
    return input_ids, labels


def _too_little(portion: Portion, count: int, seq_len: int, body: int, windows: int, read: int) -> UserError:
    wanted = f"{count} sequence{'s' if count > 1 else ''} of {seq_len}"
    if read < count * body:
        problem = f"but {wanted} need{'' if count > 1 else 's'} {count * body}"
    else:
        problem = f"but of {wanted} only {windows} have a token to predict"
    fewer = f" (at most {windows * seq_len})" if windows else ""
    return UserError(
        f"{source_label((portion,), 'train')}: the text has {read} tokens, {problem};"
        f" ask for fewer tokens{fewer} or shorter sequences, or give more text"
    )
