"""Finds what ends attention and MLP in decoder layers of a type without a file of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_ATTENTION = ("attn", "attention", "temporal")
_MLP = ("mlp", "ffn", "feed_forward", "feedforward")
_BESIDE = ("gate_proj", "indexer")
"""Parts of the names of linear layers whose outputs do not enter the residual stream themselves."""
_BEHIND = ("post_feedforward", "post_mlp", "post_ffn", "ffn_layernorm_post")
"""Parts of the names of norms between the MLP and the residual stream."""


@dataclass(frozen=True)
class Ends:
    """Paths in a decoder layer; what was not found is empty. The fields are those of `DecoderAdapter`."""

    mlp: str = ""
    mlp_out: str = ""
    attention_out: str = ""
    mlp_norm: str | None = None
    norm_offset: float = 0.0
    mlp_is_stacked: bool = False


def find_branches(layers: Iterable[nn.Module], hidden_size: int) -> Ends:
    """What ends the MLP and the attention.

    All layers must have each under the same names. A wrong guess does no harm: compensations are judged on held-out sequences,
    and checked after the export.

    Args:
        layers: The decoder layers; parameters may be on the meta device.
        hidden_size: Width of the residual stream.
    """
    found = {_of_layer(layer, hidden_size) for layer in layers}
    attention = {each.attention_out for each in found}
    ends = {replace(each, attention_out="") for each in found}
    end = ends.pop() if len(ends) == 1 else Ends()
    return replace(end, attention_out=attention.pop() if len(attention) == 1 else "")


def _of_layer(layer: nn.Module, width: int) -> Ends:
    ends = {name: end for name, child in layer.named_children() if (end := _last_linear(child, name, width))}
    attention = [name for name in ends if any(part in name.lower() for part in _ATTENTION)]
    attention_out = ends[attention[0]] if len(attention) == 1 else ""
    if norms := [name for name, _ in layer.named_children() if any(part in name for part in _BEHIND)]:
        if len(norms) > 1:
            return Ends(attention_out=attention_out)
        norm = layer.get_submodule(norms[0])
        return Ends(attention_out=attention_out, mlp_norm=norms[0], norm_offset=_offset(norm))
    stacks = {name: end for name, child in layer.named_children() if (end := _stack(child, name, width))}
    others = {name: end for name, end in {**ends, **stacks}.items() if name not in attention}
    named = {name: end for name, end in others.items() if any(part in name.lower() for part in _MLP)}
    others = named if len(named) == 1 else others
    if len(others) != 1:
        return Ends(attention_out=attention_out)
    name, end = others.popitem()
    return Ends(name, end, attention_out, mlp_is_stacked=name in stacks)


def _last_linear(module: nn.Module, name: str, width: int) -> str:
    """Path of the last linear layer with outputs of this width; empty in a mixture of experts and without one."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if any(isinstance(child, nn.ModuleList) for child in module.modules()):
        return ""
    if any(_is_stack(owner, parameter) for owner in module.modules() for parameter in owner.parameters(recurse=False)):
        return ""
    ends = [
        f"{name}.{path}" if path else name
        for path, child in module.named_modules()
        if (type(child) is nn.Linear and child.out_features == width) or (type(child) is Conv1D and child.nf == width)
        if not any(part in path for part in _BESIDE)
    ]
    return ends[-1] if ends else ""


def _stack(module: nn.Module, name: str, width: int) -> str:
    """Path of the parameter ``[experts, hidden, inner]`` that ends a mixture of experts; empty where more than that ends it."""
    from torch import nn

    stacks = {path: parameter.shape for path, parameter in module.named_parameters() if parameter.ndim == 3}
    ends = [path for path, (_, outputs, inputs) in stacks.items() if outputs == width != inputs]
    shared = any(isinstance(child, nn.Linear) and child.out_features == width for child in module.modules())
    biased = any(path.endswith("bias") for path, _ in module.named_parameters())
    return f"{name}.{ends[0]}" if len(ends) == 1 and len(stacks) == 2 and not shared and not biased else ""


def _is_stack(owner: nn.Module, parameter: nn.Parameter) -> bool:
    from torch import nn

    return parameter.ndim > 2 and not isinstance(owner, nn.Conv1d)


def _offset(norm: nn.Module) -> float:
    """What a norm adds to its weight: 1 where a new one has the weight 0."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return 0.0
    new: Any = type(norm)(weight.numel())
    return 0.0 if new.weight.any() else 1.0
