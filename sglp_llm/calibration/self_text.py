"""Samples text from the model itself, as calibration or training text that needs no data set.

Batches are stored as they are generated, and each has its own seed, so that an interrupted run resumes with the same text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglp_llm.calibration.mixtures import Spec, mixture, shares
from sglp_llm.calibration.packing import adds_bos, check_length, tokenise
from sglp_llm.calibration.specs import SELF, SELF_FIELD
from sglp_llm.errors import UserError
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating
from sglp_llm.models.source import fingerprint
from sglp_llm.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

SAMPLED_VALUES = 4096
"""Values of each parameter that go into the hash: they distinguish fine-tuned models of the same shapes."""

EMPTY_BATCHES = 8
"""Generation stops with an error after this many consecutive batches without text."""


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
    _check(model, tokens, seq_len, batch_size, temperature, top_p)
    beginnings = [_prompt(tokenizer, prompt, seq_len) for prompt in prompts] or [[_first_token(model, tokenizer)]]
    writer = _Writer(model, tokenizer, beginnings, batch_size, seq_len, temperature, top_p)
    name = f"{model.model.config.model_type}-{_digest(writer, tokens, seed)}"
    file = folder / f"{name}.jsonl"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    documents: list[str] = []
    parts: list[Path] = []
    written = empty = 0
    with progress("Writing", tokens) as advance:
        for number in count():
            parts.append(folder / f"{name}.{number:06d}.jsonl")
            batch = _stored(parts[-1])
            if batch is None:
                batch = writer.batch(number, seed)
                _store(parts[-1], batch)
            documents += [document for document in batch if document.strip()]
            new = sum(len(tokenise(tokenizer, document)) for document in batch if document.strip())
            advance(min(new, tokens - written))
            written += new
            if written >= tokens:
                break
            empty = 0 if new else empty + 1
            if empty == EMPTY_BATCHES:
                raise UserError(
                    f"{SELF}: the model writes no text ({EMPTY_BATCHES * batch_size} documents in a row are empty);"
                    " give it prompts, or another calibration text"
                )
    _store(file, documents)
    for part in parts:
        part.unlink(missing_ok=True)
    return file


def _check(model: DecoderModel, tokens: int, seq_len: int, batch_size: int, temperature: float, top_p: float) -> None:
    check_length("seq_len", seq_len)
    longest = getattr(model.model.config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise UserError(f"seq_len {seq_len} is longer than the {longest} positions that the model has")
    for name, value in (("tokens", tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}; at least 1 is needed")
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature must be positive, not {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must lie above 0 and be at most 1, not {top_p}")
    if model.weights is not None:
        raise UserError(f"{SELF}: to write text the whole model must be in memory, and it is streamed")


def _prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, seq_len: int) -> list[int]:
    ids = tokenise(tokenizer, prompt)
    if not ids:
        raise UserError("prompts: one is empty; leave all of them out to sample without prompts")
    if adds_bos(tokenizer):
        ids = [int(tokenizer.bos_token_id), *ids]
    if len(ids) >= seq_len:
        raise UserError(f"prompts: {prompt[:40]!r} has {len(ids)} tokens; it must leave room in documents of {seq_len}")
    return ids


def _first_token(model: DecoderModel, tokenizer: PreTrainedTokenizerBase) -> int:
    known = _vocabulary(model)
    special = set(tokenizer.all_special_ids)
    candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, *(id for id in range(known) if id not in special))
    return int(next(candidate for candidate in candidates if candidate is not None and candidate < known))


def _vocabulary(model: DecoderModel) -> int:
    return int(model.model.get_input_embeddings().num_embeddings)


@dataclass(frozen=True)
class _Writer:
    """A model with its sampling settings."""

    model: DecoderModel
    tokenizer: PreTrainedTokenizerBase
    beginnings: Sequence[Sequence[int]]
    batch_size: int
    seq_len: int
    temperature: float
    top_p: float

    def batch(self, number: int, seed: int) -> list[str]:
        """Samples one batch of documents; the same number and seed give the same ones."""
        first = number * self.batch_size
        rows = [self.beginnings[index % len(self.beginnings)] for index in range(first, first + self.batch_size)]
        width = max(map(len, rows))
        # Left padding: the new tokens start at the same position in every row.
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=self.model.input_device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=ids.device)
        settings = self._settings(width)
        with evaluating(self.model.model), _own_settings(self.model.model, settings), _seeded(number, seed):
            written = self.model.model.generate(ids, attention_mask=mask, generation_config=settings)
        ends = set(self.ends())
        return [self._document(row, new, ends) for row, new in zip(rows, written[:, width:].tolist(), strict=True)]

    def _document(self, beginning: Sequence[int], new: Sequence[int], ends: set[int]) -> str:
        stop = next((place for place, token in enumerate(new) if token in ends), len(new))
        # A model can have more embeddings than its tokenizer has tokens.
        ids = [token for token in (*beginning, *new[:stop]) if token < len(self.tokenizer)]
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _settings(self, width: int) -> GenerationConfig:
        from transformers import GenerationConfig

        ends = self.ends()
        return GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0,
            max_new_tokens=self.seq_len - width,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            use_cache=True,
        )

    def ends(self) -> list[int]:
        """The EOS tokens of the tokenizer and of the model's generation settings."""
        named = getattr(self.model.model.generation_config, "eos_token_id", None)
        ends = [self.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
        return list(dict.fromkeys(int(end) for end in ends if end is not None and end < _vocabulary(self.model)))


@contextmanager
def _own_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Replaces the model's generation settings, which transformers would merge into the given ones."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def _seeded(number: int, seed: int) -> Iterator[None]:
    """Seeds one batch, and restores the random state afterwards."""
    # manual_seed seeds every device.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    mixed = hashlib.sha256(f"{seed} {number}".encode()).digest()  # seed + number would repeat batches of the next seed
    with torch.random.fork_rng(devices):
        torch.manual_seed(int.from_bytes(mixed[:8], "big") >> 1)
        yield


def _digest(writer: _Writer, tokens: int, seed: int) -> str:
    """A hash of everything that the text depends on."""
    model, tokenizer = writer.model.model, writer.tokenizer
    values = hashlib.sha256()
    shapes = []
    for name, parameter in model.named_parameters():
        shapes.append((name, str(parameter.dtype), parameter.shape))
        if not parameter.is_meta:  # offloaded by accelerate
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLED_VALUES)].contiguous()
            values.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    setting: Mapping[str, Any] = {
        "model": fingerprint(model.config, shapes),
        "values": values.hexdigest(),
        "tokenizer": hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest(),
        "beginnings": [list(each) for each in writer.beginnings],
        "ends": writer.ends(),
        "settings": [writer.batch_size, writer.seq_len, writer.temperature, writer.top_p],
        "tokens": tokens,
        "seed": seed,
        "device": writer.model.input_device.type,
        "versions": [version("torch"), version("transformers")],
    }
    return hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:16]


def _stored(file: Path) -> list[str] | None:
    """The documents of a stored batch; ``None`` if the file is missing or incomplete."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)[SELF_FIELD] for line in lines]
    except (FileNotFoundError, ValueError):
        return None


def _store(file: Path, documents: Sequence[str]) -> None:
    """Writes a file atomically; concurrent runs write the same content."""
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text("".join(json.dumps({SELF_FIELD: text}) + "\n" for text in documents), encoding="utf-8")
    partial.replace(file)
