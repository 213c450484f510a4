"""Synaptic flow through the linears of every decoder layer (SynFlow: Tanaka et al., arXiv 2006.05467)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sglp_llm.engine.modes import entering_states
from sglp_llm.engine.replay import Replay
from sglp_llm.engine.resident import check_in_memory
from sglp_llm.engine.streamed import layers_in_turn
from sglp_llm.method.exact import exact
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating
from sglp_llm.progress import Progress, silent

_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


def synaptic_flows(model: DecoderModel, progress: Progress = silent) -> list[float]:
    """The sum of ``W * dR/dW`` over the elements of a decoder layer's matrices, divided by R; one number per layer.

    R is the sum over what leaves the last layer of the linear network with the absolute values of all matrices, when a vector of
    ones enters layer 0. It is published for networks of linears and activations, without attention. What is left of a layer
    here: attention is to a single token, and passes on its values; norms and activations return their input; gates are 1, biases
    0, and other vectors 1. Embeddings and head are not part of it. A router chooses experts as it always does.

    States grow with every layer. They are divided by their largest element between layers, which changes R and the sums alike.

    Args:
        model: The model, resident or streamed: every layer is loaded twice.
        progress: Reports layers.

    Raises:
        UserError: The layers cannot be run one by one, or accelerate keeps one out of memory.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.input_device)
    order = range(model.num_layers)
    entering, largest, gates = list[Tensor](), list[Tensor](), list[frozenset[str]]()
    with evaluating(model.model), progress("Synaptic flow", 2 * len(order)) as advance:
        with torch.no_grad():
            replay = Replay(model, ids, None)
            states = torch.ones_like(replay.first_states, dtype=torch.float32)
            for index, layer in layers_in_turn(model, order):
                check_in_memory(index, layer)
                entering.append(states)
                gates.append(_gates(replay, index, layer, states))
                states = _run(replay, index, layer, states, gates[index])
                largest.append(states.abs().amax())
                states = states / largest[index]
                advance(1)
        total, gradient, flows = exact(states).sum(), torch.ones_like(states), list[float]()
        for index, layer in layers_in_turn(model, reversed(order)):
            before, scale = entering[index].requires_grad_(), torch.ones((), requires_grad=True)
            leaving = _run(replay, index, layer, before, gates[index], scale) / largest[index]
            # All matrices are multiplied by the scale: at 1, the slope along it is the sum of W * dR/dW.
            gradient, flow = torch.autograd.grad(leaving, (before, scale), gradient.to(leaving.device))
            flows.append(float(flow / total))
            advance(1)
    return flows[::-1]


def _run(
    replay: Replay, index: int, layer: nn.Module, states: Tensor, gates: Collection[str], scale: Tensor | None = None
) -> Tensor:
    """The layer as a linear network, with all matrices multiplied by the scale."""
    weights = {name: _absolute(name, each, scale) for name, each in layer.named_parameters()}
    with _linear(layer, gates):
        return replay.layer(index, states, weights)


def _absolute(name: str, parameter: Tensor, scale: Tensor | None) -> Tensor:
    values = parameter.detach().float()
    if values.ndim < 2:
        return torch.zeros_like(values) if "bias" in name else torch.ones_like(values)
    return values.abs() if scale is None else values.abs() * scale.to(values.device)


def _gates(replay: Replay, index: int, layer: nn.Module, states: Tensor) -> frozenset[str]:
    """The activations that multiply what another linear makes: if they are 1, nothing leaves a layer that nothing enters."""
    names = [name for name, module in layer.named_modules() if type(module).__module__ in _ACTIVATIONS]
    nothing = torch.zeros_like(states)
    return frozenset(name for name in names if not _run(replay, index, layer, nothing, [name]).any())


@contextmanager
def _linear(layer: nn.Module, gates: Collection[str]) -> Iterator[None]:
    """Inside the block norms and activations of the layer return their input, and the activations that are gates return 1."""
    handles = []
    for name, module in layer.named_modules():
        is_norm = "norm" in type(module).__name__.lower() and not list(module.children())
        if is_norm or type(module).__module__ in _ACTIVATIONS:
            handles.append(module.register_forward_hook(_returning(name in gates), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _returning(is_gate: bool) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        entered: Tensor = entering_states(args, kwargs)
        return torch.ones_like(entered) if is_gate else entered

    return hook
