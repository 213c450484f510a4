"""What the rest of the program must know about a model family: data, no code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DecoderAdapter:
    """Where the parts of a family's ``...ForCausalLM`` sit, and which settings follow its depth.

    Attributes:
        display_name: The family's name for people.
        layers: Path of the decoder layers' ``ModuleList`` in the ``ForCausalLM``.
        depth_key: Configuration key of the number of decoder layers.
        per_layer_lists: Keys of configuration lists with one entry a decoder layer.
        layer_boundaries: Keys whose value is an index that splits the layers in two, such as Qwen2's ``max_window_layers``:
            after pruning it is the number of kept layers below it.
        obsolete_keys: Keys from which a per-layer list is derived when the list is absent; they describe a regular pattern
            that pruning breaks.
        refuse: Configuration key -> why a model that sets it (to something truthy) cannot be pruned.
        native_remote_classes: Classes that a checkpoint's ``auto_map`` may name although transformers brings the very same
            ones, left over from before the family was merged there.
        active_experts_key: In a mixture of experts, whose matrices transformers stacks as ``[experts, ...]``: the configuration
            key of how many of them a token meets.
        tiny_configs: Configurations of a few thousand parameters for the contract tests, each one a quirk of the family.
    """

    display_name: str
    layers: str = "model.layers"
    depth_key: str = "num_hidden_layers"
    per_layer_lists: tuple[str, ...] = ()
    layer_boundaries: tuple[str, ...] = ()
    obsolete_keys: tuple[str, ...] = ()
    refuse: Mapping[str, str] = field(default_factory=dict)
    native_remote_classes: tuple[str, ...] = ()
    active_experts_key: str | None = None
    tiny_configs: tuple[Mapping[str, Any], ...] = ()

    @property
    def layer_key_pattern(self) -> re.Pattern[str]:
        """Matches the name of a decoder layer's tensor in a file: group 1 is the prefix, 2 the index, 3 the rest.

        Checkpoints that were saved from the bare decoder lack the first component of the path (gpt2 and opt on the Hub do).
        """
        outer, inner = self.layers.split(".", 1)
        return re.compile(rf"^((?:{re.escape(outer)}\.)?{re.escape(inner)}\.)(\d+)(\..+)$")


TINY_LLAMA: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""The shape most families share; a family's file adds what is its own."""
