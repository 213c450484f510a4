"""GPT-2 and DistilGPT-2. Linear layers are ``Conv1D`` (transposed weights); learned position embeddings."""

from sglp_llm.adapters.base import DecoderAdapter

ADAPTER = DecoderAdapter(
    display_name="GPT-2",
    layers="transformer.h",
    depth_key="n_layer",
    refuse={"scale_attn_by_inverse_layer_idx": "its attention divides by the layer's own index, which pruning changes"},
    mlp_out="mlp.c_proj",
    attention_out="attn.c_proj",
    tiny_configs=(
        {
            "vocab_size": 320,
            "n_embd": 32,
            "n_layer": 6,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.1,
        },
    ),
)
