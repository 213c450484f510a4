"""Qwen3, dense. Like Qwen2 with normalised queries and keys."""

from sglp_llm.adapters.base import TINY_LLAMA, DecoderAdapter

_WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}

ADAPTER = DecoderAdapter(
    display_name="Qwen3",
    tiny_configs=(
        {**TINY_LLAMA, "head_dim": 16},
        {**TINY_LLAMA, **_WINDOWED, "head_dim": 16, "tie_word_embeddings": True},
    ),
)
