"""Samples text from the model itself, as calibration or training text that needs no data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sglp_llm.calibration.mixtures import Spec, mixture, shares
from sglp_llm.calibration.packing import adds_bos, tokenise
from sglp_llm.calibration.sampling import Sampler
from sglp_llm.calibration.specs import SELF, SELF_FIELD
from sglp_llm.calibration.written import Row, written_rows
from sglp_llm.errors import UserError
from sglp_llm.models.loading import DecoderModel
from sglp_llm.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokens_to_write(spec: Spec, sequences: int, seq_len: int) -> int:
    """The tokens that `self_text` must generate for a number of sequences; 0 if ``self`` is not in the specification.

    One sequence more than the share of ``self``, since joined documents can have fewer tokens than separate ones.

    Args:
        spec: One or several sources.
        sequences: Number of sequences of all sources together.
        seq_len: Tokens per sequence.
    """
    portions = mixture(spec)
    own = [
        share for portion, share in zip(portions, shares(portions, sequences), strict=True) if portion.source == SELF
    ]
    return sum((share + 1) * seq_len for share in own if share)


def self_text(
    model: DecoderModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seq_len: int,
    seed: int = 0,
    prompts: Sequence[str] = (),
    batch_size: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    folder: Path,
    progress: Progress = silent,
) -> Path:
    """Samples documents from a model and stores them; a file that exists already is reused.

    A document starts with the BOS token (if there is none, the EOS token, or else the first token that is not special) or with
    a prompt, and ends with an EOS token or after ``seq_len`` tokens. The model's generation settings are not used, except for
    its EOS tokens. The same arguments give the same text on the same type of device with the same versions of torch and
    transformers.

    Args:
        model: The model, with the whole of it in memory.
        tokenizer: The model's own.
        tokens: Least number of tokens in all, as the tokenizer encodes the text again.
        seq_len: Most tokens per document, its start included.
        seed: Seed of the sampling; the random state of the process does not change.
        prompts: Starts of the documents, used in turn and kept in the text; empty = no prompt.
        batch_size: Documents generated at once; the text depends on it.
        temperature: Sampling temperature.
        top_p: Share of the probability for nucleus sampling; 1 = all tokens.
        folder: Folder of the file; created if it is missing.
        progress: Reports the tokens generated.

    Returns:
        A JSONL file with one document per line, in the field `SELF_FIELD`. Its name contains a hash of everything that the text
        depends on.

    Raises:
        UserError: A setting is out of range, the model is streamed, a prompt is too long, or the model generates no text.
    """
    if tokens < 1:
        raise UserError(f"tokens is {tokens}; at least 1 is needed")
    sampler = Sampler(model, tokenizer, seq_len, batch_size, temperature, top_p)
    beginnings = [_prompt(tokenizer, prompt, seq_len) for prompt in prompts] or [[sampler.first_token()]]

    def batch(number: int) -> list[Row]:
        first = number * batch_size
        rows = [beginnings[index % len(beginnings)] for index in range(first, first + batch_size)]
        new = sampler.continued(rows, number, seed)
        return [{SELF_FIELD: sampler.text([*row, *more])} for row, more in zip(rows, new, strict=True)]

    def size(row: Row) -> int:
        return len(tokenise(tokenizer, row[SELF_FIELD])) if row[SELF_FIELD].strip() else 0

    digest = sampler.digest(beginnings=beginnings, tokens=tokens, seed=seed)
    return written_rows(folder, f"{model.model.config.model_type}-{digest}", batch, size, tokens, progress)


def _prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, seq_len: int) -> list[int]:
    ids = tokenise(tokenizer, prompt)
    if not ids:
        raise UserError("prompts: one is empty; leave all of them out to sample without prompts")
    if adds_bos(tokenizer):
        ids = [int(tokenizer.bos_token_id), *ids]
    if len(ids) >= seq_len:
        raise UserError(f"prompts: {prompt[:40]!r} has {len(ids)} tokens; it must leave room in documents of {seq_len}")
    return ids
