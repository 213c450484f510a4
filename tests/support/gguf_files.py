"""Tiny GGUF files, written as llama.cpp's converter would write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import tiny_model
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFWriter, get_tensor_name_map, quants
from helpers import tiny_tokenizer
from transformers import PreTrainedModel

from sglp_llm.checkpoint.export import drop_layers

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
}

# What transformers assumes of a file that does not say it; the rows are multiples of a block of 32 quantised numbers.
_GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
_AS_ASSUMED = {
    "qwen3": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}


def gguf_model(model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    """The model that `write_gguf` writes."""
    sizes = {"vocab_size": 300, "intermediate_size": 64, **_AS_ASSUMED.get(model_type, {})}
    model = tiny_model(model_type, **sizes, **changes)
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        if "norm" in name or "bias" in name:  # otherwise the same in every layer
            tensor += torch.linspace(-0.1, 0.1, tensor.numel()) * (index % 7)
    return model


def write_gguf(
    path: Path,
    model_type: str = "llama",
    quantised: GGMLQuantizationType | None = None,
    extra: dict[str, Any] | None = None,
    removed: tuple[int, ...] = (),
    **changes: Any,
) -> Path:
    """Writes `gguf_model` with a tokenizer.

    Args:
        path: The file.
        model_type: A key of `ARCHITECTURES`.
        quantised: Type of the matrices; ``None`` for float32.
        extra: More metadata.
        removed: Layers that the model lacks.
        changes: To the configuration.
    """
    model, tokenizer = gguf_model(model_type, **changes), json.loads(tiny_tokenizer()._tokenizer.to_str())["model"]
    if removed:
        drop_layers(model, removed)
    config, kind = model.config, ARCHITECTURES[model_type]
    arch = model_type.removesuffix("_text")
    writer = GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_size_label("66K")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if arch == "llama":
        writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(list(tokenizer["vocab"]))
    writer.add_token_types([3] * 3 + [1] * (len(tokenizer["vocab"]) - 3))  # control tokens first
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for key, value in (extra or {}).items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        else:
            writer.add_uint32(f"{arch}.{key}", value)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if arch == "llama" and f"{part}_proj" in name:  # the two halves of rotary embeddings are interleaved
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        if arch.startswith("gemma") and "norm" in name:
            tensor = tensor + 1
        stem, _, suffix = name.rpartition(".")
        data = tensor.numpy()
        stored = quantised if data.ndim == 2 else None
        if stored is not None:
            data = quants.quantize(data, stored)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata(path: Path) -> dict[str, Any]:
    """The file's metadata by key, without those of the form."""
    fields = GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def tensor_bytes(path: Path) -> dict[str, tuple[int, list[int], bytes]]:
    """Type, shape and bytes of every tensor by name."""
    return {
        tensor.name: (int(tensor.tensor_type), tensor.shape.tolist(), np.asarray(tensor.data).tobytes())
        for tensor in GGUFReader(path).tensors
    }
