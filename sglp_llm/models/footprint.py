"""The parameters and the KV cache of a model by decoder layer, counted from shapes and the configuration."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PretrainedConfig

from sglp_llm.models.loading import DecoderModel
from sglp_llm.records import Footprint


def footprint_of(decoder: DecoderModel, dtype: torch.dtype) -> Footprint:
    """Counts a model; parameters on ``meta`` count too.

    Args:
        decoder: The model.
        dtype: Of the weights and the KV cache.
    """
    config = decoder.model.config
    layers = tuple(sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder.layers)
    windows = attention_windows(config)
    return Footprint(
        itemsize=dtype.itemsize,
        outside=decoder.num_parameters - sum(layers),
        layers=layers,
        cached=(cached_numbers(config),) * len(layers),
        # A sliding-window layer caches what the next token will attend to beside itself.
        cached_tokens=tuple(None if window is None else window - 1 for window in windows),
        positions=getattr(config, "max_position_embeddings", None),
    )


def attention_windows(config: PretrainedConfig) -> list[int | None]:
    """How many tokens each decoder layer's attention sees, the current one included; None where there is no limit.

    Read from the cache that transformers makes for the configuration, because families configure it differently.
    """
    layers = DynamicCache(config=config).layers
    return [int(layer.sliding_window) if layer.is_sliding else None for layer in layers]


def cached_numbers(config: PretrainedConfig) -> int:
    """How many numbers a decoder layer caches for a token: a key and a value."""
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * key_heads * head_size(config))


def head_size(config: PretrainedConfig) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
