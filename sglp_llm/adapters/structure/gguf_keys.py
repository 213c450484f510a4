"""The one table of GGUF metadata keys that depend on the decoder layers, by the names after the architecture's."""

from __future__ import annotations

import re
from collections.abc import Sequence

DEPTH = "block_count"
"""The number of decoder layers."""

LAYER_TENSOR = re.compile(r"^(blk\.)(0|[1-9][0-9]{0,8})(\..+)$")
"""The name of a decoder layer's tensor: before its index, the index, after it."""

NOT_BY_LAYER = frozenset(
    {
        "adapters.token_ids_activate",
        "adapters.token_ids_substitute",
        "classifier.output_labels",
        "ple.head_offsets",
        "ple.head_vocab_sizes",
        "ple.layer_multipliers",
        "rope.dimension_sections",
    }
)
"""Arrays that may happen to be as long as the model is deep. Every other array of that length has one entry a layer."""

FRONT = frozenset({"hash_layer_count", "leading_dense_block_count"})
"""The number of layers of the first part: afterwards of those that are kept."""

REGULAR = {
    "attention.shared_kv_layers": (0,),
    "full_attention_interval": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "moe_every_n_layers": (0, 1),
    "nextn_predict_layers": (0,),
    "num_loops": (0, 1),
}
"""Keys by which llama.cpp derives from a layer's index what it is -> their values with which all layers are alike."""

WINDOWS = "attention.sliding_window_pattern"
"""Which layers attend to a sliding window alone: one truth value a layer, or every how many layers one does not."""

PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2}
"""Every how many layers one attends to everything where a file of the architecture does not say so."""

OTHER_MODEL_AT = {"gemma2": 46, "gemma3": 62}
"""Depths by which llama.cpp tells the largest model of the architecture, whose attention has another scale, from the others."""


def cut(key: str, value: object, depth: int, kept: Sequence[int]) -> object:
    """The new value of a key.

    Args:
        key: Its name without the architecture's.
        value: Its value; arrays as lists.
        depth: Number of decoder layers.
        kept: Original indices of the kept layers, ascending.
    """
    if key == DEPTH:
        return len(kept)
    if isinstance(value, list) and len(value) == depth and key not in NOT_BY_LAYER:
        return [value[layer] for layer in kept]
    if key in FRONT and isinstance(value, int):
        return sum(layer < value for layer in kept)
    return value


def windows(period: int, depth: int) -> list[bool]:
    """Which of the layers have a sliding window when every ``period``-th has none; 0: all have one."""
    return [period == 0 or layer % period < period - 1 for layer in range(depth)]
