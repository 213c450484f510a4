"""Temporary states of a live model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sglp_llm.errors import UserError
from sglp_llm.models.loading import DecoderModel

Forward = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""What a decoder layer returns for its positional arguments and its keywords."""


@contextmanager
def skipped(layers: nn.ModuleList, removed: Iterable[int]) -> Iterator[None]:
    """Inside the block the given decoder layers return their input hidden states unchanged.

    The layer still runs, because its result shows whether the model expects a tensor or a tuple; the hidden states in it are
    replaced. Not for use with a KV cache, which the layer would still fill.
    """
    handles = [layers[index].register_forward_hook(_pass_on, with_kwargs=True) for index in removed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forwards_replaced(layers: Iterable[nn.Module], functions: Sequence[Forward]) -> Iterator[None]:
    """Inside the block each decoder layer computes a function of its (args, kwargs) instead; its weights are not needed."""
    layers = list(layers)
    before = [vars(layer).get("forward") for layer in layers]
    for layer, function in zip(layers, functions, strict=True):
        vars(layer)["forward"] = lambda *args, _function=function, **kwargs: _function(args, kwargs)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = forward


@contextmanager
def replaced_weights(model: DecoderModel, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside the block some parameters of decoder layers have other values; the original values are restored afterwards.

    Nested blocks are not combined with streamed layers: only the tensors of the innermost block are in effect.

    Args:
        model: The model, resident or streamed.
        tensors: By the parameter's name in the model, in the parameter's shape; cast to its dtype and device.

    Raises:
        UserError: accelerate keeps a parameter out of memory (device_map with too little room).
    """
    if model.weights is not None:
        before = model.weights.replace(tensors)
        try:
            yield
        finally:
            model.weights.replace(before)
        return
    parameters = {name: model.model.get_parameter(name) for name in tensors}
    if away := [name for name, parameter in parameters.items() if parameter.is_meta]:
        raise UserError(f"accelerate keeps {away[0]!r} out of memory, and it is to be replaced: use --engine streamed")
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            assert parameter.shape == tensors[name].shape
            parameter.data = tensors[name].to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


def entering_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states that enter a decoder layer, from its arguments."""
    return args[0] if args else kwargs["hidden_states"]


def leaving_states(output: Any) -> Any:
    """The hidden states that leave a decoder layer, from its output."""
    return output[0] if isinstance(output, tuple | list) else output


def _pass_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    states = entering_states(args, kwargs)
    return type(output)([states, *output[1:]]) if isinstance(output, tuple | list) else states
