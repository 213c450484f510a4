"""Llama 1, 2 and 3, SmolLM, TinyLlama and every other model of type ``llama``."""

from sglp_llm.adapters.base import TINY_LLAMA, DecoderAdapter

ADAPTER = DecoderAdapter(
    display_name="Llama",
    tiny_configs=(
        TINY_LLAMA,
        {**TINY_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
)
