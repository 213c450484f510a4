"""Tiny random checkpoints of every family, written by plain transformers, and the expected logits of shortened ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from helpers import tiny_tokenizer
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sglp_llm.adapters import DecoderAdapter, adapter_names, get_adapter

REMOVED = (1, 3)


@dataclass(frozen=True)
class Tiny:
    """One tiny configuration of one family."""

    family: str
    number: int

    @property
    def adapter(self) -> DecoderAdapter:
        return get_adapter(self.family)

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.adapter.tiny_configs[self.number])

    @property
    def depth(self) -> int:
        return int(self.settings[self.adapter.depth_key])

    def __str__(self) -> str:
        return f"{self.family}-{self.number}"


def every_tiny() -> list[Tiny]:
    """Every tiny configuration of every file in adapters/."""
    return [Tiny(name, number) for name in adapter_names() for number in range(len(get_adapter(name).tiny_configs))]


def kept_without(depth: int, removed: tuple[int, ...]) -> list[int]:
    return [layer for layer in range(depth) if layer not in removed]


def random_model(family: str, **settings: Any) -> PreTrainedModel:
    """A model whose every parameter is random and large enough for every layer to matter; the same each time."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Matrices are replaced; the vectors of norms stay near their initial values, biases near 0.
            parameter.copy_(0.2 * noise if parameter.ndim >= 2 else parameter + 0.1 * noise)
    return model.eval()


def tiny_model(tiny: Tiny) -> PreTrainedModel:
    return random_model(tiny.family, **tiny.settings)


@cache
def token_ids(rows: int = 2, tokens: int = 40) -> torch.Tensor:
    """``[rows, tokens]``; longer than every tiny sliding window (8), without special tokens."""
    return torch.randint(3, 300, (rows, tokens), generator=torch.Generator().manual_seed(1))


def save_tiny(model: PreTrainedModel, folder: Path, max_shard_size: str = "5GB") -> Path:
    """A checkpoint with a tokenizer, written by transformers alone."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load_plain(folder: Path, **options: Any) -> PreTrainedModel:
    """Loads a checkpoint as a user without this package does; missing or unexpected tensors are an error."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def logits_of(model: PreTrainedModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=token_ids() if ids is None else ids, use_cache=False).logits
    return logits


@contextmanager
def passed_through(layers: nn.ModuleList, removed: tuple[int, ...], sample: PreTrainedModel) -> Iterator[None]:
    """The oracle for a removed layer: its ``forward`` returns the hidden states that it is given, unchanged."""
    shapes: list[int | None] = []
    handle = layers[0].register_forward_hook(
        lambda module, args, output: shapes.append(len(output) if isinstance(output, tuple) else None)
    )
    logits_of(sample)
    handle.remove()
    (length,) = shapes

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if length is None else (hidden_states, *[None] * (length - 1))

    for layer in removed:
        layers[layer].forward = forward
    try:
        yield
    finally:
        for layer in removed:
            del layers[layer].forward


def shortened_logits(model: PreTrainedModel, path: str, removed: tuple[int, ...]) -> torch.Tensor:
    """Logits of the model in which the removed layers at ``path`` return their input."""
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    with passed_through(layers, removed, model):
        return logits_of(model)


def greedy(model: PreTrainedModel, prompt: torch.Tensor, use_cache: bool, tokens: int = 20) -> torch.Tensor:
    """Exactly ``tokens`` new tokens."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        use_cache=use_cache,
    )


def assert_cache_changes_nothing(model: PreTrainedModel) -> None:
    """Prompts that end before, and after, the tiny sliding window of 8; both generations go past it."""
    for length in (4, 40):
        prompt = token_ids()[:, :length]
        cached, plain = greedy(model, prompt, True), greedy(model, prompt, False)
        assert cached.shape == (2, length + 20)
        assert torch.equal(cached, plain), length


def files_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The tensors of each safetensors file, in order of file name."""
    files = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            files.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a mapping
    return files


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in files_of(folder) for name, tensor in file.items()}


def write_plan(file: Path, num_layers: int, **indices: list[int]) -> Path:
    """Writes a plan as a person would."""
    file.write_text(json.dumps({"num_layers": num_layers, **indices}), encoding="utf-8")
    return file
