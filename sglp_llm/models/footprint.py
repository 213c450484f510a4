"""The parameters and the KV cache of a model by decoder layer, counted from shapes and the configuration."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from functools import lru_cache

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig

from sglp_llm.adapters import ConfigKey, auto_class
from sglp_llm.models.loading import DecoderModel
from sglp_llm.records import Footprint


def footprint_of(decoder: DecoderModel, dtype: torch.dtype) -> Footprint:
    """Counts a model; parameters on ``meta`` count too, and those that several layers share count as outside the layers.

    Args:
        decoder: The model.
        dtype: Of the weights and the KV cache.
    """
    config = decoder.config
    layers = layer_sizes(decoder.layers)
    windows = attention_windows(config)
    windows = windows[:: max(1, len(windows) // max(1, len(layers)))]
    return Footprint(
        itemsize=dtype.itemsize,
        outside=decoder.num_parameters - sum(layers),
        layers=layers,
        cached=_cached(decoder),
        # A sliding-window layer caches what the next token will attend to beside itself.
        cached_tokens=tuple(None if window is None else window - 1 for window in windows),
        positions=getattr(config, "max_position_embeddings", None),
    )


def layer_sizes(layers: nn.ModuleList) -> tuple[int, ...]:
    """The number of parameters of each decoder layer, without those that it shares with others."""
    holders = Counter(parameter for layer in layers for parameter in layer.parameters())
    return tuple(sum(each.numel() for each in layer.parameters() if holders[each] == 1) for layer in layers)


def _cached(decoder: DecoderModel) -> tuple[int, ...]:
    """How many numbers each decoder layer caches for a token; states of a fixed size, as recurrent layers have, do not count.

    What a derived family caches is not known from its configuration (a latent, nothing in recurrent layers): it is seen in the
    cache that the model fills, on fake tensors, which take no memory.
    """
    whole, depth = decoder.model.config, decoder.num_layers
    if decoder.adapter.is_derived and (seen := _seen_in_cache(ConfigKey(whole), depth)) is not None:
        return seen
    return tuple(cached_numbers(of_layer(decoder.config, layer)) for layer in range(depth))


@lru_cache(maxsize=8)
def _seen_in_cache(key: ConfigKey, depth: int) -> tuple[int, ...] | None:
    """Numbers in each layer's cache for one token; ``None`` where fake tensors cannot run the model's code."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = deepcopy(key.config)
    try:
        with torch.no_grad(), FakeTensorMode():
            # On fake tensors torch multiplies stacked expert matrices in bfloat16 only.
            model = auto_class(config).from_config(config, dtype=torch.bfloat16).eval()
            ids = torch.zeros(1, 1, dtype=torch.long)
            cache = model(input_ids=ids, use_cache=True).past_key_values
            tensors = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    except Exception:  # whatever a type's own code raises
        return None
    numbers = tuple(sum(each.numel() for each in pair if isinstance(each, torch.Tensor)) for pair in tensors)
    if len(numbers) > depth and len(numbers) % depth == 0:  # each layer fills several slots
        slots = len(numbers) // depth
        numbers = tuple(sum(numbers[first : first + slots]) for first in range(0, len(numbers), slots))
    # A cache of a type's own may end with the last layer that attends.
    return (*numbers, *[0] * (depth - len(numbers))) if len(numbers) <= depth else None


def attention_windows(config: PretrainedConfig) -> list[int | None]:
    """How many tokens each decoder layer's attention sees, the current one included; None where there is no limit.

    Read from the cache that transformers makes for the configuration, because families configure it differently.
    """
    layers = DynamicCache(config=config).layers
    # A recurrent layer's cache has no window and no keys.
    return [int(layer.sliding_window) if getattr(layer, "is_sliding", False) else None for layer in layers]


def of_layer(config: PretrainedConfig, layer: int) -> PretrainedConfig:
    """The configuration of one decoder layer; of most models the same for all."""
    one: PretrainedConfig = config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config
    return one


def cached_numbers(config: PretrainedConfig) -> int:
    """How many numbers a decoder layer caches for a token: a key and a value; none where nothing attends."""
    key_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if not key_heads:
        return 0  # nothing attends
    return int(2 * key_heads * head_size(config))


def head_size(config: PretrainedConfig) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
