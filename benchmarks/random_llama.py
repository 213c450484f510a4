"""Random Llama checkpoints of any size, written one decoder layer at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama with untied embeddings."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    key_value_heads: int

    def config(self, dtype: torch.dtype) -> dict[str, object]:
        """The content of config.json."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "dtype": str(dtype).removeprefix("torch."),
        }


def write_llama(
    folder: Path, shape: Shape, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> int:
    """Writes the checkpoint, without a tokenizer; returns its bytes. The weights are the same at every call with a device."""
    generator = torch.Generator(device).manual_seed(0)
    weight_map, total = {}, 0
    parts = list(_parts(shape))
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        tensors = {}
        for name, size in part.items():
            noise = torch.randn(size, generator=generator, device=device)
            tensors[name] = (noise * 0.02 if len(size) > 1 else 1 + 0.1 * noise).to(dtype).cpu()
            weight_map[name] = file
        save_file(tensors, folder / file, {"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(shape.config(dtype)))
    return total


def _parts(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    hidden, keys = shape.hidden, shape.hidden // shape.heads * shape.key_value_heads
    yield {"model.embed_tokens.weight": (shape.vocabulary, hidden)}
    for layer in range(shape.layers):
        sizes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (shape.intermediate, hidden),
            "mlp.up_proj": (shape.intermediate, hidden),
            "mlp.down_proj": (hidden, shape.intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        yield {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}
    yield {"model.norm.weight": (hidden,), "lm_head.weight": (shape.vocabulary, hidden)}
