"""Passes the parameter gradients of decoder layers to observers during a backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from sglp_llm.engine.norms.ghost import Norms, squared_norm
from sglp_llm.engine.norms.linears import WatchedLinears
from sglp_llm.engine.norms.vectors import WatchedVectors, sequences_are_separable
from sglp_llm.engine.observer import Batch, Need, Observer
from sglp_llm.engine.settings import PassSettings
from sglp_llm.models.loading import DecoderModel
from sglp_llm.processes import Processes

STEP_TOKENS = {"cpu": 512}
"""Tokens of a step with gradients that keep a device busy: more take memory and save no time."""

STEP_TOKENS_ELSEWHERE = 8192


def sequences_a_step(model: DecoderModel, needs: Need, settings: PassSettings, tokens: int) -> int:
    """How many sequences a step of a pass takes: ``batch_size``, or less with gradients.

    It is 1 where gradients could not be told apart by sequence: whole ones, and norms where `sequences_are_separable` is false,
    as experts see the tokens of all sequences mixed. Otherwise it is limited by `most_sequences` and by ``gradient_batch``.
    """
    if not needs & Need.BACKWARD:
        return settings.batch_size
    size = min(
        settings.gradient_batch or settings.batch_size, most_sequences(settings.batch_size, tokens, model.input_device)
    )
    if Need.GRADIENTS in needs:
        return 1
    if Need.GRADIENT_NORMS in needs and size > 1:
        has_experts = model.adapter.active_experts_key is not None
        if settings.norms == "autograd" or has_experts or not sequences_are_separable(model.layers):
            return 1
    return size


def most_sequences(batch_size: int, tokens: int, device: torch.device) -> int:
    """The sequences of a step with gradients, of so many tokens each: a batch, or what keeps the device busy."""
    return max(1, min(batch_size, STEP_TOKENS.get(device.type, STEP_TOKENS_ELSEWHERE) // tokens))


@contextmanager
def watched_gradients(
    layers: Mapping[int, nn.Module],
    observers: Sequence[Observer],
    current: list[Batch],
    norms: Norms = "auto",
    batched: bool = False,
) -> Iterator[None]:
    """Inside the block a backward pass gives the observers the gradients of these decoder layers, and stores none.

    Each parameter's ``grad`` and ``requires_grad`` are restored afterwards. If the observers need only norms, the weights of
    linear layers have ``requires_grad`` off, except with ``norms="autograd"``. If they need neither, the block changes nothing.

    Args:
        layers: Decoder layers by their index.
        observers: Those that need gradients or their norms are called.
        current: A list with the batch of the current sequences as its only element; a new `Batch` object for each step.
        norms: How the norms of linear layers are computed. If an observer needs whole gradients, norms are taken from them.
        batched: Whether a batch may have several sequences (see `sequences_a_step`).
    """
    whole = [observer for observer in observers if Need.GRADIENTS in observer.needs]
    of_norms = [observer for observer in observers if Need.GRADIENT_NORMS in observer.needs]
    if not whole and not of_norms:
        yield
        return
    parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]

    def show_norm(index: int, batch: Batch, name: str, squared: torch.Tensor) -> None:
        for observer in of_norms:
            observer.on_gradient_norm(index, batch, name, squared)

    def hook_for(index: int, name: str) -> Any:
        def hook(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            for observer in whole:
                observer.on_gradient(index, current[0], name, weight.detach(), weight.grad)
            if of_norms:
                show_norm(index, current[0], name, squared_norm(weight.grad)[None])
            weight.grad = None

        return hook

    handles: list[Any] = []
    watching: list[WatchedLinears | WatchedVectors] = []
    for index, layer in layers.items():
        watched: set[str] = set()
        if not whole and norms != "autograd":
            mine: list[WatchedLinears | WatchedVectors] = [
                WatchedLinears(layer, current, partial(show_norm, index), norms)
            ]
            if batched:
                mine.append(WatchedVectors(layer, current, partial(show_norm, index)))
            watched = {name for each in mine for name in each.names}
            watching += mine
        for name, parameter in layer.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(name not in watched)
            if name not in watched:
                handles.append(parameter.register_post_accumulate_grad_hook(hook_for(index, name)))
    try:
        yield
        for each in watching:
            each.finish()
    finally:
        for handle in [*handles, *watching]:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def end_gradients(index: int, layer: nn.Module, observers: Sequence[Observer], processes: Processes) -> None:
    """Calls ``on_gradients_end`` of the observers of a backward pass, after all sequences' gradients of this layer."""
    weights = {name: weight.detach() for name, weight in layer.named_parameters()}
    for observer in observers:
        if observer.needs & Need.BACKWARD:
            observer.on_gradients_end(index, weights, processes)
