"""Qwen2 and Qwen2.5. Layers from ``max_window_layers`` on use sliding-window attention where it is switched on."""

from sglp_llm.adapters.base import TINY_LLAMA, DecoderAdapter

_WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}

ADAPTER = DecoderAdapter(
    display_name="Qwen2",
    tiny_configs=(TINY_LLAMA, {**TINY_LLAMA, **_WINDOWED, "tie_word_embeddings": True}),
)
