"""GPT-NeoX and Pythia. Attention and MLP in parallel by default; the head is ``embed_out``."""

from sglp_llm.adapters.base import TINY_LLAMA, DecoderAdapter

_TINY = {**{key: value for key, value in TINY_LLAMA.items() if key != "num_key_value_heads"}, "initializer_range": 0.1}

ADAPTER = DecoderAdapter(
    display_name="GPT-NeoX",
    layers="gpt_neox.layers",
    mlp_out="mlp.dense_4h_to_h",
    attention_out="attention.dense",
    tiny_configs=(_TINY, {**_TINY, "use_parallel_residual": False}),
)
