"""Phi-3, Phi-3.5 and Phi-4, text only; queries, keys and values share one matrix, as do gate and up."""

from sglp_llm.adapters.base import TINY_LLAMA, DecoderAdapter

ADAPTER = DecoderAdapter(
    display_name="Phi-3",
    # Microsoft's checkpoints still name the code they were released with.
    native_remote_classes=("Phi3Config", "Phi3ForCausalLM"),
    tiny_configs=({**TINY_LLAMA, "sliding_window": 8}, TINY_LLAMA),
)
