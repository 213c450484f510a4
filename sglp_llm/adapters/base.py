"""What the rest of the program must know about a model family: data, no code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglp_llm.adapters.structure.exceptions import Exceptions


@dataclass(frozen=True)
class Branch:
    """A block's contribution to the residual stream, and the parameters into which a linear map of it can be folded.

    Attributes:
        output: Module of a decoder layer whose output is the contribution.
        last: What computes it last: a linear layer, a stack of matrices ``[experts, hidden, ...]``, or a norm.
        is_norm: Whether ``last`` is a norm, into which only a diagonal map (one factor per channel) can be folded.
        is_stacked: Whether ``last`` is a stack of matrices.
        offset: What a norm adds to its weight before it multiplies by it.
    """

    output: str
    last: str
    is_norm: bool = False
    is_stacked: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class DecoderAdapter:
    """Paths of the modules of a family's ``...ForCausalLM``, and what is special about it.

    Configuration keys that depend on the layers are in one table for all families, `structure/config_keys.py`.

    Attributes:
        display_name: The family's name for people.
        layers: Path of the decoder layers' ``ModuleList`` in the ``ForCausalLM``.
        stored_layers: Their path in files, where transformers stores them under another.
        depth_key: Configuration key of the number of decoder layers.
        refuse: Configuration key -> why a model that sets it (to something truthy) cannot be pruned.
        native_remote_classes: Classes that a checkpoint's ``auto_map`` may name because transformers has them built in: old
            checkpoints still name the code from before the family was merged there.
        active_experts_key: In a mixture of experts, whose matrices transformers stacks as ``[experts, ...]``: the configuration
            key of the number of active experts per token.
        mlp: Module of a decoder layer whose output is added to the residual stream, after `mlp_norm` where there is one; empty
            where it was not found by structure, as are the next two.
        mlp_out: The last linear layer of the MLP, or in a mixture of experts the parameter that stacks them.
        attention_out: The last linear layer of the attention.
        mlp_norm: A norm between the MLP and the residual stream.
        norm_offset: What the family's norms add to their weight before they multiply by it.
        sum_norm: A norm of the sum of residual stream and MLP, in models that set ``sum_norm_unless`` to false.
        sum_norm_unless: That configuration key; none = no model of the family has such a norm.
        exceptions: What neither the configuration keys nor the modules say about the type.
        is_derived: Whether the family has no file, and this was found by structure.
        mlp_is_stacked: Whether in a derived family ``mlp_out`` is a parameter that stacks matrices ``[experts, ...]``.
        has_stacks: Whether a derived family's layers have parameters ``[experts, ...]``; written ones have `active_experts_key`.
        tiny_configs: Configurations of a few thousand parameters for the contract tests, one for each variant of the family.
    """

    display_name: str
    layers: str = "model.layers"
    stored_layers: str = ""
    depth_key: str = "num_hidden_layers"
    refuse: Mapping[str, str] = field(default_factory=dict)
    native_remote_classes: tuple[str, ...] = ()
    active_experts_key: str | None = None
    mlp: str = "mlp"
    mlp_out: str = "mlp.down_proj"
    attention_out: str = "self_attn.o_proj"
    mlp_norm: str | None = None
    norm_offset: float = 0.0
    sum_norm: str = ""
    sum_norm_unless: str | None = None
    exceptions: Exceptions = field(default_factory=Exceptions)
    is_derived: bool = False
    mlp_is_stacked: bool = False
    has_stacks: bool = False
    tiny_configs: tuple[Mapping[str, Any], ...] = ()

    @property
    def stacks_experts(self) -> bool:
        """Whether transformers stacks matrices of experts in the layers."""
        return self.has_stacks or self.active_experts_key is not None

    def mlp_branch(self, config: object) -> Branch:
        """The `Branch` of the MLP's contribution to a decoder layer's output, or of the whole output where the sum is normed.

        Args:
            config: The model's configuration.
        """
        if self.sum_norm_unless is not None and not getattr(config, self.sum_norm_unless):
            return Branch(self.sum_norm, self.sum_norm, is_norm=True, offset=self.norm_offset)
        if self.mlp_norm is not None:
            return Branch(self.mlp_norm, self.mlp_norm, is_norm=True, offset=self.norm_offset)
        is_stacked = self.mlp_is_stacked or self.active_experts_key is not None
        return Branch(self.mlp, self.mlp_out, is_stacked=is_stacked)

    @property
    def layer_key_pattern(self) -> re.Pattern[str]:
        """Matches the name of a decoder layer's tensor in a file: group 1 is the prefix, 2 the index, 3 the rest.

        Checkpoints that were saved from the bare decoder lack the first component of the path (gpt2 and opt on the Hub do).
        """
        paths = (path.split(".", 1) for path in (self.layers, self.stored_layers) if path)
        prefixes = "|".join(rf"(?:{re.escape(outer)}\.)?{re.escape(inner)}" for outer, inner in paths)
        return re.compile(rf"^((?:{prefixes})\.)(0|[1-9][0-9]{{0,8}})(\..+)$")


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
"""The configuration that most families share; a family's file adds its own keys."""
