"""Shows observers what a backward pass makes of the parameters of decoder layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sglp_llm.engine.observer import Batch, Need, Observer


def squared_norm(gradient: torch.Tensor) -> torch.Tensor:
    """The square of the Frobenius norm, a float64 scalar.

    Row by row, because a float32 sum over a whole matrix loses up to 1e-3 of it.
    """
    rows = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32)
    norm: torch.Tensor = torch.linalg.vector_norm(rows, dtype=torch.float64)
    return norm.square()


@contextmanager
def watched_gradients(
    layers: Mapping[int, nn.Module], observers: Sequence[Observer], current: list[Batch]
) -> Iterator[None]:
    """Inside the block a backward pass shows the observers the gradients of these decoder layers, and keeps none.

    Gradients that wait for somebody's optimiser are neither lost nor added to.

    Args:
        layers: Decoder layers by their index.
        observers: Those that need gradients or their norms are shown them.
        current: Holds the one sequence that is under way.
    """
    whole = [observer for observer in observers if Need.GRADIENTS in observer.needs]
    norms = [observer for observer in observers if Need.GRADIENT_NORMS in observer.needs]
    parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]

    def hook_for(index: int, name: str) -> Any:
        def hook(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            for observer in whole:
                observer.on_gradient(index, current[0], name, weight.detach(), weight.grad)
            if norms:
                squared = squared_norm(weight.grad)
                for observer in norms:
                    observer.on_gradient_norm(index, current[0], name, squared)
            weight.grad = None

        return hook

    handles = []
    for index, layer in layers.items():
        for name, parameter in layer.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(hook_for(index, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
