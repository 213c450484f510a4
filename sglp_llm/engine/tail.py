"""What a model does after its last decoder layer, as a chain of its own modules: mostly the final norm and the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from sglp_llm.models.loading import DecoderModel

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Calls the whole model, layers apart, with the states that leave its last layer."""

_KNOWN: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()


def tail_of(model: DecoderModel, states: torch.Tensor, logits_of: Logits) -> list[nn.Module]:
    """The modules that turn the states leaving the last layer into logits, each given what the one before returns.

    They take the host much less time than a call of the whole model. They are not assumed but seen, once for a model: every
    tensor on the way must be handed on untouched. Where it is not, because logits are scaled or capped by the model's own code
    or moved between devices, there is no such chain.

    Args:
        model: The model.
        states: ``[batch, tokens, hidden]``; two tokens of them are looked at.
        logits_of: See `Logits`.

    Returns:
        The modules, front to back; empty where there is no such chain.
    """
    if model.model not in _KNOWN:
        with torch.inference_mode(False), torch.no_grad():
            _KNOWN[model.model] = _seen(model, states[:1, :2].clone(), logits_of)
    return [model.model.get_submodule(name) for name in _KNOWN[model.model]]


def _seen(model: DecoderModel, states: torch.Tensor, logits_of: Logits) -> tuple[str, ...]:
    current = _Passed.now(states)
    with _module_calls() as calls:
        logits = logits_of(states)
    inside = {id(module) for module in model.layers.modules()}
    names = {id(module): name for name, module in model.model.named_modules() if id(module) not in inside}
    chain = []
    for module, given, returned in calls:
        if id(module) in names and given == current:
            chain.append(names[id(module)])
            current = returned
    if not chain or _Passed.now(logits) != current:
        return ()
    for name in chain:
        states = model.model.get_submodule(name)(states)
    return tuple(chain) if torch.equal(states, logits) else ()


@dataclass(frozen=True)
class _Passed:
    """What tells whether two views are of the same numbers, which nothing has changed in-place in between."""

    shape: torch.Size
    address: int
    device: torch.device
    version: int

    @classmethod
    def now(cls, tensor: Any) -> _Passed | None:
        if not isinstance(tensor, torch.Tensor):
            return None
        return cls(tensor.shape, tensor.data_ptr(), tensor.device, tensor._version)


@contextmanager
def _module_calls() -> Iterator[list[tuple[nn.Module, _Passed | None, _Passed | None]]]:
    """Inside the block the list gets every call of a module: the module, its first argument, and what it returned."""
    calls: list[tuple[nn.Module, _Passed | None, _Passed | None]] = []
    kept: list[Any] = []  # so that no address is given twice

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept.append((args, output))
        calls.append((module, _Passed.now(args[0] if args else None), _Passed.now(output)))

    handle = register_module_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()
