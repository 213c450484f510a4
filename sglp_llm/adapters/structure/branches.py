"""Finds the last linear layers of attention and MLP in decoder layers of a type without a file of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_ATTENTION = ("attn", "attention")
_BEHIND = ("post_feedforward", "post_mlp", "post_ffn", "ffn_layernorm_post")
"""Parts of the names of norms between the MLP and the residual stream, into which no matrix can be folded."""


def find_branches(layers: Iterable[nn.Module], hidden_size: int) -> tuple[str, str, str]:
    """Paths in a decoder layer: the MLP, its last linear layer, and the last linear layer of the attention.

    All layers must have them under the same names; what they have not is empty. A wrong guess does no harm: every compensation
    is judged on held-out sequences, and checked after the export.

    Args:
        layers: The decoder layers; parameters may be on the meta device.
        hidden_size: Width of the residual stream.
    """
    found = {tuple(_of_layer(layer, hidden_size)) for layer in layers}
    mlp, mlp_out, attention_out = (
        parts.pop() if len(parts) == 1 else "" for parts in map(set, zip(*found, strict=True))
    )
    return (mlp, mlp_out, attention_out) if mlp and mlp_out else ("", "", attention_out)


def _of_layer(layer: nn.Module, hidden_size: int) -> Iterator[str]:
    ends = {name: end for name, child in layer.named_children() if (end := _last_linear(child, hidden_size))}
    attention = [name for name in ends if any(part in name.lower() for part in _ATTENTION)]
    others = [name for name in ends if name not in attention]
    is_normed = any(part in name for name, _ in layer.named_children() for part in _BEHIND)
    has_one = len(others) == 1 and not is_normed
    yield others[0] if has_one else ""
    yield f"{others[0]}.{ends[others[0]]}" if has_one else ""
    yield f"{attention[0]}.{ends[attention[0]]}" if len(attention) == 1 else ""


def _last_linear(module: nn.Module, width: int) -> str:
    """Path of the last linear layer with outputs of this width; empty in a mixture of experts and without one."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if any(isinstance(child, nn.ModuleList) for child in module.modules()):
        return ""
    if any(parameter.ndim > 2 for parameter in module.parameters()):
        return ""
    ends = [
        name
        for name, child in module.named_modules()
        if (type(child) is nn.Linear and child.out_features == width) or (type(child) is Conv1D and child.nf == width)
    ]
    return ends[-1] if ends else ""
