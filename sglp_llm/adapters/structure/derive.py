"""Finds the decoder layers of a model by its structure, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from sglp_llm.adapters.base import DecoderAdapter
from sglp_llm.adapters.structure.branches import find_branches
from sglp_llm.adapters.structure.exceptions import EXCEPTIONS, Exceptions
from sglp_llm.adapters.structure.wrappers import auto_class, is_wrapper, text_config
from sglp_llm.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_DEPTH_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def derive(config: PretrainedConfig, written: Callable[[str], DecoderAdapter | None]) -> DecoderAdapter:
    """The adapter of a model type without a file of its own.

    Args:
        config: The resolved configuration; its weights are not needed.
        written: The adapter of a type that has a file, and ``None`` of others.

    Raises:
        UserError: Layers of such a model cannot be removed; the message says why.
    """
    model_type, text = str(config.model_type), text_config(config)
    exceptions = EXCEPTIONS.get(model_type) or EXCEPTIONS.get(str(text.model_type), Exceptions())
    if reason := exceptions.refuse or _other_kind(config) or _other_kind(text):
        raise UserError(f"layers of a model of type {model_type!r} cannot be removed: {reason}")
    model = empty_model(config)
    path, depth_key = find_layers(model)
    stored = _stored_path(model, path)
    found: dict[str, Any] = {"layers": path, "stored_layers": stored if stored != path else "", "depth_key": depth_key}
    exceptions = replace(exceptions, fused=_fused_in(model, exceptions.fused))
    if (family := written(str(text.model_type))) is not None:  # of a wrapper around a family with a file
        return replace(family, **found, exceptions=exceptions, is_derived=True)
    ends = find_branches(model.get_submodule(path), int(getattr(text, "hidden_size", 0)))
    return DecoderAdapter(
        display_name=model_type,
        **found,
        **asdict(ends),
        refuse=exceptions.refuse_settings,
        exceptions=exceptions,
        is_derived=True,
        has_stacks=_has_stacks(model.get_submodule(path)),
    )


def _fused_in(model: PreTrainedModel, fused: Mapping[str, int]) -> Mapping[str, int]:
    """The same parameters by their names in this model: a wrapper has them below its own decoder."""
    if not fused:
        return fused
    names = [name for name, _ in model.named_parameters()]
    ends = {name: name.removeprefix("model.") for name in fused}
    return {
        name: dimension
        for known, dimension in fused.items()
        for name in names
        if name == known or name.endswith(f".{ends[known]}")
    }


def _has_stacks(layers: nn.Module) -> bool:
    """Whether layers hold parameters ``[experts, ...]``."""
    from torch import nn

    return any(
        parameter.ndim == 3
        for module in layers.modules()
        if not isinstance(module, nn.Conv1d)
        for parameter in module.parameters(recurse=False)
    )


def _other_kind(config: PretrainedConfig) -> str:
    """Why a model is no decoder-only language model; empty where it is one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder beside its decoder"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "it is an encoder, trained to fill in masked words, and the losses here are those of predicting the next word"
    return ""


def _stored_path(model: PreTrainedModel, path: str) -> str:
    """The path of the decoder layers in the files that transformers writes."""
    from transformers.core_model_loading import revert_weight_conversion

    first = {name: parameter for name, parameter in model.named_parameters() if name.startswith(f"{path}.0.")}
    paths = {name.partition(".0.")[0] for name in revert_weight_conversion(model, first) if ".0." in name}
    return paths.pop() if len(paths) == 1 else path


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model with every parameter on the meta device and real buffers.

    Raises:
        UserError: transformers has no such model, or cannot build it.
    """
    from sglp_llm.adapters.structure.empty import without_weights

    try:
        with without_weights():
            model: PreTrainedModel = auto_class(config).from_config(deepcopy(config)).eval()
            return model
    except Exception as error:  # whatever a type's own code raises for a configuration that does not fit it
        raise UserError(
            f"transformers cannot build a language model of type {config.model_type!r} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from None


def find_layers(model: PreTrainedModel) -> tuple[str, str]:
    """Path of the decoder layers' ``ModuleList``, and the configuration key of its length.

    Of all lists whose length is the depth, outside other lists, it is the one with the most parameters; in a wrapper, among those
    that belong to the decoder: the module whose configuration is the nested one.

    Raises:
        UserError: There is no such list.
    """
    config = text_config(model.config)
    mapped = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    depths = {key: depth for key in (mapped, *_DEPTH_KEYS) if isinstance(depth := getattr(config, key, None), int)}
    found = [
        (sum(parameter.numel() for parameter in layers.parameters()), path, key)
        for path, layers in _outer_lists(model)
        for key, depth in depths.items()
        if len(layers) == depth and path.startswith(_decoder_path(model))
    ]
    if not found:
        raise UserError(
            f"layers of a model of type {model.config.model_type!r} cannot be removed: it has no list of modules that is as "
            "long as its configuration says it is deep"
        )
    _, path, key = max(found, key=lambda each: each[0])  # the first of equal ones
    return path, key


def _decoder_path(model: PreTrainedModel) -> str:
    """Path of the module that a wrapper's nested configuration describes; empty otherwise."""
    if not is_wrapper(model.config):
        return ""
    nested = str(text_config(model.config).model_type)
    for path, module in model.named_modules():  # the outermost one
        if path and getattr(getattr(module, "config", None), "model_type", None) == nested:
            return str(path)
    return ""


def _outer_lists(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from torch import nn

    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for path, module in lists:
        if not any(path.startswith(f"{other}.") for other, _ in lists):
            yield path, module
