"""OPT. The 350m model projects the embeddings in and out and normalises after each block instead of before."""

from sglp_llm.adapters.base import DecoderAdapter

_TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "init_std": 0.1,
}

ADAPTER = DecoderAdapter(
    display_name="OPT",
    layers="model.decoder.layers",
    mlp="fc2",
    mlp_out="fc2",
    attention_out="self_attn.out_proj",
    sum_norm="final_layer_norm",
    sum_norm_unless="do_layer_norm_before",
    tiny_configs=(
        {**_TINY, "layerdrop": 0.5},
        {**_TINY, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
)
