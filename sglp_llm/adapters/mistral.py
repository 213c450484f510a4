"""Mistral 7B, Mistral Nemo and other models of type ``mistral``."""

from sglp_llm.adapters.base import TINY_LLAMA, DecoderAdapter

ADAPTER = DecoderAdapter(
    display_name="Mistral",
    tiny_configs=({**TINY_LLAMA, "sliding_window": 8}, {**TINY_LLAMA, "sliding_window": None}),
)
