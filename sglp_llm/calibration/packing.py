"""Documents -> windows of token ids: shuffled, joined, tokenised and cut."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

import torch

from sglp_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"

CHARACTERS_PER_TOKEN = 6
"""A first guess, on the high side, of the text that some tokens need; where it was too low, the text is doubled."""

PIECE_CHARACTERS = 4_000_000
"""Longest text tokenised in one call: a fast tokenizer holds a few hundred bytes per token during the call."""

STREAM_CHARACTERS = 500_000
"""Least length of the text that a stream tokenises in one call."""

UNSETTLED_TOKENS = 16
"""The last tokens of a text that was not read to its end, which might merge with what follows: never used."""

POOL_DOCUMENTS, POOL_CHARACTERS = 4096, 64_000_000
"""Limits of the shuffle buffer, in which a source's documents are put in random order."""

_Document = TypeVar("_Document", bound=Sized)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's own encoding of a text starts with its BOS token."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def check_length(name: str, value: int) -> None:
    """Refuses sequences that are too short for a prediction.

    Raises:
        UserError: It is too small.
    """
    if value < 2:
        raise UserError(f"{name} is {value}; at least 2 tokens are needed to predict one from another")


def shuffled(documents: Iterable[_Document], rng: random.Random) -> Iterator[_Document]:
    """The documents in random order, through a shuffle buffer; ``len`` of a document is its size in characters."""
    pool: list[_Document] = []
    size = 0
    for document in documents:
        pool.append(document)
        size += len(document)
        while len(pool) > POOL_DOCUMENTS or (size > POOL_CHARACTERS and len(pool) > 1):
            chosen = rng.randrange(len(pool))
            pool[chosen], pool[-1] = pool[-1], pool[chosen]
            size -= len(pool[-1])
            yield pool.pop()
    rng.shuffle(pool)
    yield from pool


def token_ids(tokenizer: PreTrainedTokenizerBase, documents: Iterator[str], needed: int | None) -> list[int]:
    """The token ids of the joined documents: all of them, or (given ``needed``) at least that many if there are enough."""
    text: list[str] = []
    size, wanted = 0, math.inf if needed is None else (needed + UNSETTLED_TOKENS) * CHARACTERS_PER_TOKEN
    document = next(documents, None)
    while document is not None:
        text.append(document)
        size += len(document)
        document = next(documents, None)
        if needed is not None and document is not None and size >= wanted:
            # All of it again instead of the new part alone: the tokens at a seam are then those of the joined text.
            ids = tokenise(tokenizer, SEPARATOR.join(text))
            if len(ids) >= needed + UNSETTLED_TOKENS:
                return ids[:-UNSETTLED_TOKENS]
            wanted = 2 * size
    return tokenise(tokenizer, SEPARATOR.join(text))


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text without special tokens; one longer than `PIECE_CHARACTERS` is cut at line breaks."""
    return [token for piece in _tokenised_pieces(tokenizer, text) for token in piece]


def _tokenised_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[list[int]]:
    start = 0
    while start < len(text):
        stop = start + PIECE_CHARACTERS
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        # verbose=False: the text is longer than the model's context on purpose, and needs no warning.
        yield tokenizer(text[start:stop], add_special_tokens=False, verbose=False)["input_ids"]
        start = stop


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[list[int]]:
    """The token ids of the joined documents, in pieces, as the documents are read.

    A piece has at least `STREAM_CHARACTERS` characters, if there are as many, and ends at the end of a document, or inside a
    document longer than `PIECE_CHARACTERS`. Only at the ends of pieces can the tokens differ from those of the whole text.
    """
    text: list[str] = []
    size, seam = 0, ""
    for document in documents:
        text.append(document)
        size += len(document)
        if size >= STREAM_CHARACTERS:
            yield from _tokenised_pieces(tokenizer, seam + SEPARATOR.join(text))
            text, size, seam = [], 0, SEPARATOR
    yield from _tokenised_pieces(tokenizer, seam + SEPARATOR.join(text) if text else "")


def windows_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], body: int, bos: bool) -> torch.Tensor:
    """The windows ``[len(ids) // body, body]`` of a list of ids, or one token wider with the BOS token in front."""
    windows = torch.tensor(ids[: len(ids) // body * body], dtype=torch.int64).view(-1, body)
    if not bos:
        return windows
    return torch.cat([torch.full((len(windows), 1), tokenizer.bos_token_id, dtype=torch.int64), windows], dim=1)


def hash_of(*tensors: torch.Tensor) -> str:
    """The sha256, in hex, of tensors of one shape: of the shape, and of their values in little-endian order."""
    digest = hashlib.sha256(repr(tuple(tensors[0].shape)).encode())
    for tensor in tensors:
        values = tensor.numpy()
        digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()
