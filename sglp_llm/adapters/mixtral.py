"""Mixtral, a mixture of experts; files keep one matrix an expert, transformers fuses them on loading."""

from sglp_llm.adapters.base import TINY_LLAMA, DecoderAdapter

ADAPTER = DecoderAdapter(
    display_name="Mixtral",
    tiny_configs=({**TINY_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},),
)
