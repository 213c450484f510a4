"""Texts -> token sequences: what a model is calibrated on, and what its perplexity is measured on.

How sequences are made is our choice; the paper does not say. Documents are joined by a blank line, tokenised without
special tokens and cut into consecutive windows that do not overlap; where the tokenizer itself puts a BOS token in
front of a text, every window starts with one. Nothing is padded, and nothing depends on a batch size.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sglp_llm.calibration.files import ENOUGH_TEXT_BYTES
from sglp_llm.calibration.mixtures import Portion, Spec, interleaved, mixture, shares
from sglp_llm.calibration.packing import adds_bos, check_length, hash_of, shuffled, token_ids, windows_of
from sglp_llm.calibration.texts import load_documents, source_label
from sglp_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CalibrationSet:
    """The sequences that every layer's statistics are computed on.

    Attributes:
        input_ids: ``[samples, tokens]``, int64.
        mask: ``[samples, tokens]``, bool; False marks padding.
        source: The specification, with its split where it has one.
        seed: Seed of the choice of documents and windows.
        hash: sha256, in hex, of shape, ids and mask: the same on every machine for the same sequences.
        bos: Whether every sequence begins with the BOS token.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    source: str
    seed: int
    hash: str
    bos: bool

    def first(self, samples: int | None) -> CalibrationSet:
        """The first sequences, as a set of its own; all of them for ``None``."""
        if samples is None or samples >= len(self.input_ids):
            return self
        ids, mask = self.input_ids[:samples], self.mask[:samples]
        return replace(self, input_ids=ids, mask=mask, hash=hash_of(ids, mask))


@dataclass(frozen=True)
class EvaluationWindows:
    """The windows that perplexity is measured on.

    Attributes:
        input_ids: ``[windows, window]``, int64.
        source: The specification, with its split where it has one.
        bos: Whether every window begins with the BOS token, which counts towards its length.
    """

    input_ids: torch.Tensor
    source: str
    bos: bool


def calibration_set(
    tokenizer: PreTrainedTokenizerBase,
    spec: Spec,
    *,
    samples: int = 32,
    seq_len: int = 512,
    seed: int = 0,
    self_file: Path | None = None,
) -> CalibrationSet:
    """Sequences from documents in seeded random order; reading stops as soon as there is enough text.

    Where that text gives more windows than samples, as one long document does, the windows are a seeded sample. Documents
    are drawn from a shuffle buffer of at most `POOL_DOCUMENTS` documents that is refilled in the order of the source. Each
    source of a mixture gives its share of the sequences, the same ones as alone, in a seeded order among the others'.

    Args:
        tokenizer: The model's own.
        spec: One source, see `load_documents`, or several, see `mixture`; ``train`` is the default split.
        samples: Number of sequences.
        seq_len: Tokens in one, the BOS token included where there is one.
        seed: Seed of the only random generator that is used.
        self_file: The file for ``self``, from `sglp_llm.calibration.self_text`.

    Raises:
        UserError: A number is too small, the text cannot be read, or there is too little of it.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}; at least 1 sequence is needed")
    check_length("seq_len", seq_len)
    portions, bos = mixture(spec), adds_bos(tokenizer)
    counts = shares(portions, samples)
    drawn = []
    for portion, count in zip(portions, counts, strict=True):
        if count:
            documents = load_documents(portion.source, "train", tokenizer, self_file, enough_bytes(count * seq_len))
            drawn.append(_drawn(tokenizer, documents, portion, count, samples, seq_len, seed))
    input_ids = torch.cat(drawn)[interleaved(counts, seed)]
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    return CalibrationSet(input_ids, mask, source_label(portions, "train"), seed, hash_of(input_ids, mask), bos)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    spec: Spec,
    *,
    window: int,
    max_windows: int | None = None,
    bos: bool | None = None,
) -> EvaluationWindows:
    """Consecutive windows of a split in the order of its source; the last, partial one is dropped.

    Args:
        tokenizer: The model's own.
        spec: One source, see `load_documents`; ``test`` is the default split.
        window: Tokens in one, the BOS token included where there is one.
        max_windows: Keep only the first ones.
        bos: Whether every window begins with a BOS token; None means what the tokenizer does by itself.

    Raises:
        UserError: A number is too small, the tokenizer has no BOS token to add, there are several sources, the text cannot
            be read, or it is shorter than one window.
    """
    portions = mixture(spec)
    if len(portions) > 1:
        raise UserError(
            f"{source_label(portions, 'test')} is a mixture, and perplexity is measured on one source: name one of them"
        )
    check_length("window", window)
    if max_windows is not None and max_windows < 1:
        raise UserError(f"max_windows is {max_windows}; at least 1 window is needed")
    if bos and tokenizer.bos_token_id is None:
        raise UserError("a BOS token was asked for, but this tokenizer has none; leave bos out or set it to false")
    source = source_label(portions, "test")
    bos = adds_bos(tokenizer) if bos is None else bos
    body = window - bos
    documents = load_documents(
        portions[0].source,
        "test",
        tokenizer,
        enough=None if max_windows is None else enough_bytes(max_windows * window),
    )
    ids = token_ids(tokenizer, documents, None if max_windows is None else max_windows * body)
    if len(ids) < body:
        raise UserError(
            f"{source}: the text has {len(ids)} tokens, but one window of {window} needs {body};"
            " lower window or give more text"
        )
    return EvaluationWindows(windows_of(tokenizer, ids, body, bos)[:max_windows], source, bos)


def enough_bytes(tokens: int) -> int:
    """How far a file of plain text is read for so many tokens: much further, since windows are drawn from all that is read."""
    return max(ENOUGH_TEXT_BYTES, 64 * tokens)


def _drawn(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterator[str],
    portion: Portion,
    count: int,
    samples: int,
    seq_len: int,
    seed: int,
) -> torch.Tensor:
    """One source's ``count`` of all ``samples`` sequences, ``[count, seq_len]``."""
    bos = adds_bos(tokenizer)
    body, rng = seq_len - bos, random.Random(seed)
    ids = token_ids(tokenizer, shuffled(documents, rng), count * body)
    available = len(ids) // body
    if available < count:
        mixed = count < samples
        which = f"its {count} of the {samples} sequences of {seq_len}" if mixed else f"{count} sequences of {seq_len}"
        lower = f"samples{f' to {available}' if available and not mixed else ''}{', its weight' if mixed else ''} or seq_len"
        raise UserError(
            f"{source_label((portion,), 'train')}: the text has {len(ids)} tokens, but {which} need {count * body};"
            f" lower {lower}, or give more text"
        )
    windows = list(range(available)) if available == count else rng.sample(range(available), count)
    return windows_of(tokenizer, ids, body, bos)[windows]
