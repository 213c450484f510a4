"""Norms of the gradients of biases and of the vectors of norms, for each sequence of a batch.

Autograd sums the gradient of a parameter over all sequences. What a norm returns is affine in its vectors, element by element:
``y = w * u(x) + b``. So the gradient of w for one sequence is the sum over its tokens of ``dLoss/dy * u(x)``, and ``u(x)`` is
what the module returns for w = 1 less what it returns for w = 0, whatever the family's formula. A bias is the case ``u = 1``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from sglp_llm.engine.norms.linears import Report
from sglp_llm.engine.observer import Batch
from sglp_llm.method.exact import exact

LINEARS = (nn.Linear, Conv1D)


def sequences_are_separable(layers: nn.ModuleList) -> bool:
    """Whether the gradient of every parameter can be had for each sequence of a batch.

    So it is where every parameter belongs to a linear layer, or is a vector of a module that is affine in it (see above). Not so
    for stacked experts, convolutions and whatever else a layer may hold.
    """
    known: dict[tuple[type, torch.Size], bool] = {}
    for module in layers.modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or type(module) in LINEARS:
            continue
        key = type(module), next(iter(own.values())).shape
        if key not in known:
            known[key] = _is_affine(module, own)
        if not known[key]:
            return False
    return True


class WatchedVectors:
    """Computes the norms of a decoder layer's vectors from the inputs and output gradients of the modules that hold them.

    The caller turns ``requires_grad`` off for them.

    Args:
        layer: A layer of a model for which `sequences_are_separable`.
        current: A list with the batch of the current sequences as its only element.
        report: Called once for each vector and batch.

    Attributes:
        names: Names of the vectors, in the decoder layer.
    """

    def __init__(self, layer: nn.Module, current: list[Batch], report: Report) -> None:
        self.names: set[str] = set()
        self._current, self._report = current, report
        self._batch: Batch | None = None
        self._sums: dict[str, torch.Tensor] = {}  # [sequences, width] of uses whose gradient has arrived
        self._waiting: dict[str, int] = {}
        self._handles = []
        for path, module in layer.named_modules():
            names = {
                name: f"{path}.{name}" for name, vector in module.named_parameters(recurse=False) if vector.ndim == 1
            }
            if names:
                self.names |= set(names.values())
                self._handles.append(module.register_forward_hook(self._hook_for(names), with_kwargs=True))

    def finish(self) -> None:
        """Reports vectors with missing output gradients: outputs that the loss does not depend on contribute 0."""
        for name in list(self._sums):
            self._conclude(name)
        self._waiting.clear()

    def remove(self) -> None:
        """Removes the hooks and frees all stored tensors."""
        for handle in self._handles:
            handle.remove()
        self._sums.clear()

    def _hook_for(self, names: dict[str, str]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            if self._batch is not self._current[0]:
                self.finish()
                self._batch = self._current[0]
            for name in names.values():
                self._waiting[name] = self._waiting.get(name, 0) + 1
            if not output.requires_grad:
                output.requires_grad_(True)
            is_linear = type(module) in LINEARS
            inputs = None if is_linear else (args[0] if args else next(iter(kwargs.values()))).detach()

            def arrived(gradient: torch.Tensor) -> None:
                with torch.no_grad():
                    for own, slope in _slopes(module, list(names), inputs):
                        self._arrived(names[own], gradient, slope)

            output.register_hook(arrived)

        return hook

    def _arrived(self, name: str, gradient: torch.Tensor, slope: torch.Tensor | None) -> None:
        assert self._batch is not None
        each = gradient if slope is None else gradient.float() * slope.float()
        rows = each.reshape(self._batch.size, -1, each.shape[-1]).sum(dim=1, dtype=torch.float32)
        self._sums[name] = self._sums[name] + rows if name in self._sums else rows
        self._waiting[name] -= 1
        if self._waiting[name] == 0:
            self._conclude(name)

    def _conclude(self, name: str) -> None:
        assert self._batch is not None
        self._report(self._batch, name, exact(self._sums.pop(name)).square().sum(dim=1))


def _slopes(
    module: nn.Module, names: list[str], inputs: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The derivative of every element of what a module returns by the vector's element; ``None`` is 1 throughout."""
    if inputs is None:
        yield from ((name, None) for name in names)
        return
    nothing = {name: torch.zeros_like(module.get_parameter(name)) for name in names}
    base = functional_call(module, nothing, (inputs,))
    for name in names:
        yield name, functional_call(module, {**nothing, name: torch.ones_like(nothing[name])}, (inputs,)) - base


def _is_affine(module: nn.Module, own: Mapping[str, torch.Tensor]) -> bool:
    """Tries a module on random numbers: whether it is affine in its vectors, element by element, on one input."""
    width = next(iter(own.values())).shape
    if any(True for _ in module.children()) or len(width) != 1 or any(vector.shape != width for vector in own.values()):
        return False
    known = next(iter(own.values()))
    device = torch.device("cpu") if known.is_meta else known.device
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 3, *width, generator=generator).to(device)
    vectors = {name: torch.randn(width, generator=generator).to(device) for name in own}
    nothing = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
    try:
        with torch.no_grad():
            whole, expected = (functional_call(module, values, (inputs,)) for values in (vectors, nothing))
            base = expected
            for name, vector in vectors.items():
                slope = functional_call(module, {**nothing, name: torch.ones_like(vector)}, (inputs,)) - base
                expected = expected + vector * slope
    except Exception:  # it wants other arguments
        return False
    return whole.shape == inputs.shape and torch.allclose(whole, expected, rtol=1e-3, atol=1e-3)
