"""What a plain transformers model holds in memory: its weights, and the KV cache that it fills itself."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import token_ids
from transformers import PreTrainedModel


def cache_after(model: PreTrainedModel, tokens: int) -> Any:
    """The cache of one sequence of so many tokens."""
    with torch.no_grad():
        return model(input_ids=token_ids(1)[:, :tokens], use_cache=True).past_key_values


def cache_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def weight_bytes(model: PreTrainedModel) -> int:
    """Tied weights count once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def total_bytes(model: PreTrainedModel, tokens: int) -> int:
    return weight_bytes(model) + cache_bytes(cache_after(model, tokens))
