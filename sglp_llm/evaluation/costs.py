"""Costs of a model by counting: parameters, bytes, floating-point operations, KV cache. Nothing is run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from sglp_llm.adapters.structure.config_keys import ACTIVE_EXPERTS
from sglp_llm.models.footprint import attention_windows, footprint_of, head_size, of_layer
from sglp_llm.models.loading import DecoderModel


@dataclass(frozen=True)
class Costs:
    """The counts of a model.

    Attributes:
        layers: Number of decoder layers.
        parameters: Number of parameters, tied ones once.
        layer_parameters: Those of the decoder layers.
        weight_bytes: Bytes of the parameters as they were loaded, tied ones once.
        context: Tokens that attention sees, the current one included, in the two counts below that depend on it.
        flops_per_token: Floating-point operations of computing one token, head included, when it sees ``context`` tokens: 2
            for each multiplication with a weight, and 2 for each of attention's two products. A mixture of experts counts
            the active experts. Norms, activations and rotary embeddings are left out, as is usual.
        kv_cache_bytes_per_token: Bytes by which the KV cache of a sequence grows per token, before any sliding window is
            full.
        kv_cache_bytes: Bytes of the KV cache of one sequence after ``context`` tokens, sliding windows considered.
    """

    layers: int
    parameters: int
    layer_parameters: int
    weight_bytes: int
    context: int
    flops_per_token: int
    kv_cache_bytes_per_token: int
    kv_cache_bytes: int


def count_costs(decoder: DecoderModel, context: int) -> Costs:
    """Counts, from the parameters' shapes and the configuration; parameters on ``meta`` count too.

    Args:
        decoder: The model.
        context: See `Costs`; at least 1.
    """
    config, dtype = decoder.config, decoder.model.dtype
    footprint = footprint_of(decoder, dtype)
    windows = attention_windows(config)
    seen = [context if window is None else min(context, window) for window in windows]
    return Costs(
        layers=decoder.num_layers,
        parameters=footprint.params_without(()),
        layer_parameters=sum(footprint.layers),
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in decoder.model.parameters()),
        context=context,
        flops_per_token=2 * _active_weights(decoder)
        + 4 * sum(_attending(of_layer(config, layer)) * tokens for layer, tokens in enumerate(seen)),
        kv_cache_bytes_per_token=footprint.itemsize * sum(footprint.cached),
        kv_cache_bytes=footprint.cache_bytes_without((), context),
    )


def _attending(config: PretrainedConfig) -> int:
    """Width of a query of all heads; 0 where nothing attends."""
    return config.num_attention_heads * head_size(config) if getattr(config, "num_attention_heads", None) else 0


def _active_weights(decoder: DecoderModel) -> int:
    """How many weights one token is multiplied with."""
    return sum(_multiplied(module, decoder) for module in decoder.model.modules())


def _multiplied(module: nn.Module, decoder: DecoderModel) -> int:
    if isinstance(module, nn.Embedding):  # looked up; a head that is tied to it is a module of its own
        return 0
    weights = 0
    for parameter in module.parameters(recurse=False):
        if parameter.ndim == 2 or (parameter.ndim > 2 and isinstance(module, nn.Conv1d)):
            weights += parameter.numel()
        elif parameter.ndim > 2:
            weights += _active_experts(parameter, decoder)
    return weights


def _active_experts(stacked: torch.Tensor, decoder: DecoderModel) -> int:
    """How many weights of matrices ``[experts, ...]`` are active for one token."""
    keys = (decoder.adapter.active_experts_key, *ACTIVE_EXPERTS)
    active = next((value for key in keys if key and isinstance(value := getattr(decoder.config, key, None), int)), None)
    return stacked[0].numel() * min(active or len(stacked), len(stacked))
