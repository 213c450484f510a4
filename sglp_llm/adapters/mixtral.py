"""Mixtral, a mixture of experts; files store one matrix per expert, transformers stacks them on loading."""

from sglp_llm.adapters.base import TINY_LLAMA, DecoderAdapter

ADAPTER = DecoderAdapter(
    display_name="Mixtral",
    active_experts_key="num_experts_per_tok",
    mlp_out="mlp.experts.down_proj",
    tiny_configs=({**TINY_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},),
)
