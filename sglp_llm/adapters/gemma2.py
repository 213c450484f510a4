"""Gemma 2. Every second layer has sliding-window attention; transformers picks eager attention for its soft-capped scores."""

from sglp_llm.adapters.base import TINY_LLAMA, DecoderAdapter

ADAPTER = DecoderAdapter(
    display_name="Gemma 2",
    mlp_norm="post_feedforward_layernorm",
    norm_offset=1.0,
    tiny_configs=({**TINY_LLAMA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},),
)
