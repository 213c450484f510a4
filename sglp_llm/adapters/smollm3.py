"""SmolLM3. Every fourth layer has no rotary embedding (NoPE); ``no_rope_layers`` says which."""

from sglp_llm.adapters.base import TINY_LLAMA, DecoderAdapter

_TINY = {**TINY_LLAMA, "num_hidden_layers": 8}

ADAPTER = DecoderAdapter(
    display_name="SmolLM3",
    tiny_configs=(
        {**_TINY, "no_rope_layer_interval": 2},
        {**_TINY, "use_sliding_window": True, "sliding_window": 8, "tie_word_embeddings": True},
    ),
)
