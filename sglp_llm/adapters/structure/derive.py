"""Finds the decoder layers of a model by its structure, on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from sglp_llm.adapters.base import DecoderAdapter
from sglp_llm.adapters.structure.exceptions import EXCEPTIONS, Exceptions
from sglp_llm.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_DEPTH_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def derive(config: PretrainedConfig) -> DecoderAdapter:
    """The adapter of a model type without a file of its own.

    Args:
        config: The resolved configuration; its weights are not needed.

    Raises:
        UserError: Layers of such a model cannot be removed; the message says why.
    """
    model_type = str(config.model_type)
    exceptions = EXCEPTIONS.get(model_type, Exceptions())
    if exceptions.refuse:
        raise UserError(f"layers of a model of type {model_type!r} cannot be removed: {exceptions.refuse}")
    path, depth_key = find_layers(empty_model(config))
    return DecoderAdapter(
        display_name=model_type,
        layers=path,
        depth_key=depth_key,
        refuse=exceptions.refuse_settings,
        exceptions=exceptions,
        is_derived=True,
    )


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model with every parameter on the meta device and real buffers.

    Raises:
        UserError: transformers has no such model, or cannot build it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(deepcopy(config)).eval()
    except Exception as error:  # whatever a type's own code raises for a configuration that does not fit it
        raise UserError(
            f"transformers cannot build a causal language model of type {config.model_type!r} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from None


def find_layers(model: PreTrainedModel) -> tuple[str, str]:
    """Path of the decoder layers' ``ModuleList``, and the configuration key of its length.

    Of all lists whose length is the depth, outside other lists, it is the one with the most parameters.

    Raises:
        UserError: There is no such list.
    """
    config = model.config
    mapped = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    depths = {key: depth for key in (mapped, *_DEPTH_KEYS) if isinstance(depth := getattr(config, key, None), int)}
    found = [
        (sum(parameter.numel() for parameter in layers.parameters()), path, key)
        for path, layers in _outer_lists(model)
        for key, depth in depths.items()
        if len(layers) == depth
    ]
    if not found:
        raise UserError(
            f"layers of a model of type {config.model_type!r} cannot be removed: it has no list of "
            f"{' or '.join(str(depth) for depth in dict.fromkeys(depths.values()))} decoder layers"
        )
    _, path, key = max(found, key=lambda each: each[0])  # the first of equal ones
    return path, key


def _outer_lists(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from torch import nn

    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for path, module in lists:
        if not any(path.startswith(f"{other}.") for other, _ in lists):
            yield path, module
