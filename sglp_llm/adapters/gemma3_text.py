"""Gemma 3, text only. Five sliding-window layers to one global one, each kind with its own rotary base."""

from sglp_llm.adapters.base import TINY_LLAMA, DecoderAdapter

_TINY = {**TINY_LLAMA, "num_hidden_layers": 8, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}

ADAPTER = DecoderAdapter(
    display_name="Gemma 3 (text)",
    mlp_norm="post_feedforward_layernorm",
    norm_offset=1.0,
    tiny_configs=(_TINY, {**_TINY, "sliding_window_pattern": 3}),
)
