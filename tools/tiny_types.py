"""A tiny random model of any causal type of the installed transformers: small sizes by the name of the configuration key."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

DEPTH = 8

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_top_k": 2,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 96,
    "ffn_dim": 96,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 8,
    "query_pre_attn_scalar": 16,
    "word_embed_proj_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "n_mamba_heads": 2,
    "mamba_d_ssm": 128,
    "mamba_dt_rank": 4,
    "mamba_headdim": 16,
    "state_size": 16,
    "ssm_state_size": 16,
    "time_step_rank": 4,
    "chunk_size": 16,
    "attention_head_dim": 16,
    "lru_width": 64,
    "attention_window_size": 8,
    "conv_L_cache": 3,
    "attention_chunk_size": 8,
    "first_k_dense_replace": 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "attention_hidden_size": 64,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 8,
    "hc_lowrank": 8,
    "rotary_dim": 8,
    "dim_head": 16,
    "dim_ff": 96,
    "dff": 96,
    "zero_expert_num": 2,
}
"""What is set where the configuration has the key."""

_LATENT = {"num_key_value_heads": 4}
_LATENT_TYPES = (
    "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 youtu dots3_note_text"
)

TYPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_LATENT_TYPES.split(), _LATENT),
    "bamba": {"attn_layer_indices": [2, 6]},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"] * 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "bailing_hybrid": {**_LATENT, "layer_group_size": 3},
    "kimi_linear": {
        **_LATENT,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"] * 2,
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]], "window_size": 8},
    "lfm2": {"full_attn_idxs": [2, 4, 6]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "longcat_flash": {"num_layers": DEPTH, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe", "mamba", "mamba", "attention", "moe"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 1000,
    },
    "rwkv": {"rescale_every": 0},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}
"""What a type needs beside or instead of that; None leaves a key at its default."""


def tiny_config(model_type: str) -> Any:
    """The configuration of a model of a few hundred thousand parameters, `DEPTH` layers deep."""
    from transformers import CONFIG_MAPPING

    of_type = CONFIG_MAPPING[model_type]
    known = {field.name for field in fields(of_type)} if is_dataclass(of_type) else set()
    names = {of_type.attribute_map.get(name, name): value for name, value in SIZES.items()}
    settings = {name: value for name, value in names.items() if name in known} | TYPES.get(model_type, {})
    return of_type(**{name: value for name, value in settings.items() if value is not None})
