"""Tiny random models of multimodal wrappers: a vision tower of one layer beside a decoder of `DEPTH`."""

from __future__ import annotations

from typing import Any

DEPTH = 6

_TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {**_TEXT, "sliding_window": 8, "query_pre_attn_scalar": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_SIGLIP: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN_TOWER = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32}
_TOKENS = {"image_token_index": 300, "image_token_id": 300, "video_token_id": 301}

WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**_GEMMA, "model_type": "gemma3_text"},
        "vision_config": {**_SIGLIP, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": {
            **_GEMMA,
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": 320,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "global_head_dim": 8,
        },
        "vision_config": {**_SIGLIP, "model_type": "gemma4_vision", "head_dim": 8, "num_key_value_heads": 2},
        "audio_config": None,
    },
    "idefics3": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_SIGLIP, "model_type": "idefics3_vision"},
        "scale_factor": 2,
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_SIGLIP, "model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [8, 8]},
    },
    "kimi_k25": {
        "text_config": {
            **{key: value for key, value in _TEXT.items() if key not in ("head_dim", "num_key_value_heads")},
            "model_type": "deepseek_v3",
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 2,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 8,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "pos_emb_time": 2,
        },
        "projection_hidden_size": 16,
        "tie_word_embeddings": False,
    },
    "llama4": {
        "text_config": {
            **_TEXT,
            "model_type": "llama4_text",
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
        },
        "vision_config": {
            **_SIGLIP,
            "model_type": "llama4_vision_model",
            "intermediate_size": 64,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "vision_output_dim": 16,
        },
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_SIGLIP, "model_type": "clip_vision_model", "projection_dim": 16},
    },
    "llava_next": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_SIGLIP, "model_type": "clip_vision_model", "projection_dim": 16},
        "image_grid_pinpoints": [[16, 32], [32, 16]],
    },
    "llava_onevision": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_SIGLIP, "model_type": "siglip_vision_model"},
        "image_grid_pinpoints": [[16, 32], [32, 16]],
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_SIGLIP, "model_type": "pixtral", "head_dim": 8},
    },
    "paligemma": {
        "text_config": {**_TEXT, "model_type": "gemma"},
        "vision_config": {**_SIGLIP, "model_type": "siglip_vision_model", "projection_dim": 32},
        "projection_dim": 32,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "model_type": "qwen2_5_vl_text", "rope_parameters": _ROPE},
        "vision_config": {**_QWEN_TOWER, "fullatt_block_indexes": [0]},
    },
    "qwen3_5": {
        "text_config": {
            **_TEXT,
            "model_type": "qwen3_5_text",
            "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0},
        },
        "vision_config": {**_QWEN_TOWER, "num_position_embeddings": 16},
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "model_type": "qwen3_vl_text", "rope_parameters": _ROPE},
        "vision_config": {**_QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "smolvlm": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_SIGLIP, "model_type": "smolvlm_vision"},
        "scale_factor": 2,
    },
}
"""What is set in the configuration of each wrapper."""


def tiny_wrapper(model_type: str) -> Any:
    """The configuration of a wrapper of a few ten thousand parameters."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**{**_TOKENS, **WRAPPERS[model_type]})
