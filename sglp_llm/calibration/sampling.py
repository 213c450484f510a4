"""Samples text from a model in batches, each with its own seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from sglp_llm.calibration.packing import check_length
from sglp_llm.calibration.specs import SELF
from sglp_llm.errors import UserError
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating
from sglp_llm.models.source import fingerprint

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

SAMPLED_VALUES = 4096
"""Values of each parameter that go into the hash: they distinguish fine-tuned models of the same shapes."""


@dataclass(frozen=True)
class Sampler:
    """A model with its sampling settings; the model's own generation settings are not used, except for its EOS tokens.

    Attributes:
        model: The model, with the whole of it in memory.
        tokenizer: The model's own.
        seq_len: Most tokens of a document, its beginning included.
        batch_size: Documents generated at once; what is generated depends on it.
        temperature: Sampling temperature.
        top_p: Share of the probability for nucleus sampling; 1 = all tokens.

    Raises:
        UserError: A setting is out of range, or the model is streamed.
    """

    model: DecoderModel
    tokenizer: PreTrainedTokenizerBase
    seq_len: int
    batch_size: int
    temperature: float
    top_p: float

    def __post_init__(self) -> None:
        check_length("seq_len", self.seq_len)
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and self.seq_len > longest:
            raise UserError(f"seq_len {self.seq_len} is longer than the {longest} positions that the model has")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; at least 1 is needed")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature must be positive, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie above 0 and be at most 1, not {self.top_p}")
        if self.model.weights is not None:
            raise UserError(f"{SELF}: to write text the whole model must be in memory, and it is streamed")

    def continued(self, beginnings: Sequence[Sequence[int]], number: int, seed: int) -> list[list[int]]:
        """Samples what follows some beginnings, up to an EOS token; the same number and seed give the same tokens.

        Args:
            beginnings: Token ids, one list a document, each shorter than ``seq_len``.
            number: Number of the batch.
            seed: Seed of all batches; the random state of the process does not change.
        """
        width = max(map(len, beginnings))
        # Left padding: the new tokens start at the same position in every row.
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in beginnings], device=self.model.input_device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in beginnings], device=ids.device)
        settings = self._settings(width)
        with evaluating(self.model.model), own_settings(self.model.model, settings), _seeded(number, seed):
            written = self.model.model.generate(ids, attention_mask=mask, generation_config=settings)
        ends = set(self.ends())
        return [list(takewhile(lambda token: token not in ends, row)) for row in written[:, width:].tolist()]

    def text(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special ones left out."""
        # A model can have more embeddings than its tokenizer has tokens.
        known = [token for token in ids if token < len(self.tokenizer)]
        text = self.tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def first_token(self) -> int:
        """What a document begins with: BOS, or else EOS, or else the first token that is not special."""
        known = self._vocabulary()
        special = set(self.tokenizer.all_special_ids)
        named = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        candidates = (*named, *(id for id in range(known) if id not in special))
        return int(next(candidate for candidate in candidates if candidate is not None and candidate < known))

    def ends(self) -> list[int]:
        """The EOS tokens of the tokenizer and of the model's generation settings."""
        named = getattr(self.model.model.generation_config, "eos_token_id", None)
        ends = [self.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
        return list(dict.fromkeys(int(end) for end in ends if end is not None and end < self._vocabulary()))

    def digest(self, **others: Any) -> str:
        """A hash of everything that the text depends on: the model, the tokenizer, the settings, and what is given."""
        model, tokenizer = self.model.model, self.tokenizer
        values = hashlib.sha256()
        shapes = []
        for name, parameter in model.named_parameters():
            shapes.append((name, str(parameter.dtype), parameter.shape))
            if not parameter.is_meta:  # offloaded by accelerate
                flat = parameter.detach().reshape(-1)
                sample = flat[:: max(1, flat.numel() // SAMPLED_VALUES)].contiguous()
                values.update(sample.view(torch.uint8).cpu().numpy().tobytes())
        setting = {
            "model": fingerprint(model.config, shapes),
            "values": values.hexdigest(),
            "tokenizer": hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest(),
            "ends": self.ends(),
            "settings": [self.batch_size, self.seq_len, self.temperature, self.top_p],
            "device": self.model.input_device.type,
            "versions": [version("torch"), version("transformers")],
            **others,
        }
        return hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:16]

    def _vocabulary(self) -> int:
        return int(self.model.model.get_input_embeddings().num_embeddings)

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


@contextmanager
def own_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
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
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed_of(seed, number))  # seed + number would repeat batches of the next seed
        yield


def seed_of(*parts: int) -> int:
    """A seed of 63 bits from several numbers; other numbers give another one."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
