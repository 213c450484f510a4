"""The one table of configuration keys that depend on the decoder layers, and what becomes of them when layers are removed."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

PER_LAYER = frozenset(
    {
        "activation_sparsity_pattern",
        "attention_layers",
        "indexer_types",
        "intermediate_size",
        "kv_source_layers",
        "layer_rope_theta",
        "layer_types",
        "layers_block_type",
        "mlp_layer_types",
        "no_rope_layers",
        "num_attention_heads_per_layer",
        "num_key_value_heads_per_layer",
    }
)
"""Lists with one entry a decoder layer. Where the value is no list of that length, the key is left alone."""

LAYER_KINDS = ("layer_types", "layers_block_type")
"""Those of them that say what kind of layer each one is."""

CYCLES = frozenset({"block_types"})
"""Lists that are repeated until every decoder layer has an entry; written out for the kept layers."""

RUNS = frozenset({"attention_types"})
"""Lists of ``[[kind, ...], times]``; written out, one decoder layer an entry."""

INDICES = frozenset(
    {
        "attn_layer_indices",
        "full_attn_idxs",
        "hybrid_layer_ids",
        "local_layer_ids",
        "mlp_only_layers",
        "moe_layers",
        "rope_scaling_layers",
    }
)
"""Lists of indices of decoder layers."""

INDICES_FROM_ONE = frozenset({"ple_layer_ids"})
"""The same, counted from 1."""

FRONT = frozenset(
    {"first_k_dense_replace", "max_window_layers", "moe_layer_start_index", "num_dense_layers", "num_hash_layers"}
)
"""An index that splits the layers in two: afterwards the number of kept layers below it."""

FRONT_INCLUSIVE = frozenset({"moe_layer_end_index"})
"""The index of the last layer of the first part: afterwards the number of kept layers up to it, less one."""

END = frozenset({"num_kv_shared_layers"})
"""The number of layers of the last part: afterwards of those that are kept."""

AS_DEEP = frozenset({"num_blocks"})
"""A second key of the depth, where it is equal to it."""

BY_INDEX = frozenset({"per_layer_config"})
"""Dictionaries whose keys are indices of decoder layers."""

PATTERN_OF = {
    "_sliding_window_pattern": "layer_types",
    "sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "hybrid_override_pattern": "layers_block_type",
    "interleave_moe_layer_step": "moe_layers",
    "moe_layer_freq": "mlp_layer_types",
    "index_topk_freq": "indexer_types",
    "index_topk_pattern": "indexer_types",
    "index_skip_topk_offset": "indexer_types",
}
"""A regular pattern from which another key is derived where that one is absent. Pruning breaks it, and writes the other one."""

PREDICTORS = ("num_nextn_predict_layers", "num_mtp_layers")
"""How many layers for multi-token prediction a checkpoint may hold behind the decoder layers."""

ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
"""How many experts of a mixture a token meets."""

OWN_INDEX = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx"})
"""Attributes of modules that hold the index of the decoder layer they are in."""

FIRST_INDEX = frozenset({"first_kv_shared_layer_idx"})
"""Attributes of modules that hold the index of the first layer of the last part."""

OTHER_INDEX = frozenset({"kv_shared_layer_index"})
"""Attributes of modules that hold the index of another decoder layer."""


def shortened(config: Any, depth_key: str, kept: Sequence[int]) -> dict[str, Any]:
    """New values of every configuration key that depends on the layers, the depth included.

    Args:
        config: transformers' resolved configuration, where lists that the JSON may lack are filled in.
        depth_key: Key of the number of decoder layers.
        kept: Original indices of the kept layers, ascending.
    """
    depth = int(getattr(config, depth_key))
    values = {
        key: new for key, value in config.to_dict().items() if (new := _shortened(key, value, depth, kept)) is not None
    }
    return {**values, **_sparse_layers(config, depth, kept), depth_key: len(kept)}


def superseded(written: Container[str]) -> set[str]:
    """Keys of regular patterns that a configuration must not hold when it holds these keys."""
    return {pattern for pattern, derived in PATTERN_OF.items() if derived in written}


def renumbered(name: str, value: int, old: int, kept: Sequence[int]) -> int | None:
    """What an attribute of a module that holds the index of a decoder layer becomes.

    Args:
        name: Name of the attribute.
        value: Its value. A layer that fills two slots of the KV cache holds ``2 * index`` and ``2 * index + 1``.
        old: Original index of the layer that the module is in; one of ``kept``.
        kept: Original indices of the kept layers, ascending.

    Returns:
        The new value; ``None`` for an attribute that holds no index, or that of a removed layer.
    """
    if name in FIRST_INDEX:
        return sum(layer < value for layer in kept)
    if name in OTHER_INDEX:
        return kept.index(value) if value in kept else None
    if name not in OWN_INDEX:
        return None
    new = kept.index(old)
    return new if value == old else value - 2 * (old - new)


def _shortened(key: str, value: Any, depth: int, kept: Sequence[int]) -> Any:
    """The new value of one key, ``None`` where it does not depend on the layers."""
    if isinstance(value, list | tuple):
        if key in PER_LAYER and len(value) == depth:
            return [value[layer] for layer in kept]
        if key in CYCLES and value:
            return [value[layer % len(value)] for layer in kept]
        if key in INDICES:
            return [new for new, layer in enumerate(kept) if layer in value]
        if key in INDICES_FROM_ONE:
            return [new + 1 for new, layer in enumerate(kept) if layer + 1 in value]
        if key in RUNS:
            kinds = [kind for run, times in value for _ in range(times) for kind in run]
            return [[[kinds[layer]], 1] for layer in kept]
    elif isinstance(value, Mapping):
        if key in BY_INDEX:
            by_index = {int(layer): entry for layer, entry in value.items()}
            return {str(new): by_index[layer] for new, layer in enumerate(kept) if layer in by_index}
    elif isinstance(value, int) and not isinstance(value, bool):
        if key in FRONT:
            return sum(layer < value for layer in kept)
        if key in AS_DEEP and value == depth:
            return len(kept)
        if key in FRONT_INCLUSIVE:
            return sum(layer <= value for layer in kept) - 1
        if key in END:
            return sum(layer >= depth - value for layer in kept)
    return None


def _sparse_layers(config: Any, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """Every n-th layer is sparse (``decoder_sparse_step``): afterwards the dense layers stand in ``mlp_only_layers``."""
    step, dense = getattr(config, "decoder_sparse_step", None), getattr(config, "mlp_only_layers", None)
    if dense is None or not isinstance(step, int) or step == 1:
        return {}
    dense = {layer for layer in range(depth) if layer in dense or (layer + 1) % step}
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [new for new, layer in enumerate(kept) if layer in dense],
    }
