"""Temporary states of a live model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (OPT has LayerDrop), and afterwards for every module the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def skipped(layers: nn.ModuleList, removed: Iterable[int]) -> Iterator[None]:
    """Inside the block the given decoder layers hand on the hidden states they receive.

    The layer still runs and its result is thrown away: what shape of result the model expects (a tensor or a tuple) is the
    layer's own business. Not for use with a KV cache, which the layer would fill.
    """
    handles = [layers[index].register_forward_hook(_pass_on, with_kwargs=True) for index in removed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def entering_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states among the arguments of a decoder layer."""
    return args[0] if args else kwargs["hidden_states"]


def leaving_states(output: Any) -> Any:
    """The hidden states among the results of a decoder layer."""
    return output[0] if isinstance(output, tuple) else output


def _pass_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    states = entering_states(args, kwargs)
    return (states, *output[1:]) if isinstance(output, tuple) else states
