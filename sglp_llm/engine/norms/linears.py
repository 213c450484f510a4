"""Computes the norms of linear layers' weight gradients during a backward pass, without computing these gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sglp_llm.engine.norms.ghost import Norms, linear_squared_norm
from sglp_llm.engine.observer import Batch

Report = Callable[[Batch, str, torch.Tensor], None]
"""Called with the sequences, a weight's name and the squared norm of the gradients of a group of weights, ``[batch]`` float64."""


class WatchedLinears:
    """Stores the inputs and output gradients of a decoder layer's linear layers until the norm is computed from both.

    The caller turns ``requires_grad`` off for their weights. A weight is assumed to be used only when its module is called.
    Inputs are stored from the forward pass on, as autograd would do for the weight's gradient. Both are freed once all output
    gradients of a group have arrived.

    Args:
        layer: The decoder layer.
        current: A list with the batch of the current sequences as its only element.
        report: Called once per group. Linear layers form a group if they had the same input, or if one of their weights was used
            with several inputs.
        norms: ``auto``, ``ghost`` or ``direct``.

    Attributes:
        names: Names of the weights, in the decoder layer.
    """

    def __init__(self, layer: nn.Module, current: list[Batch], report: Report, norms: Norms) -> None:
        self.names: set[str] = set()
        self._current, self._report, self._norms = current, report, norms
        self._batch: Batch | None = None
        self._by_input: dict[int, _Group] = {}
        self._by_name: dict[str, _Group] = {}
        self._handles = []
        names: dict[Any, str] = {parameter: name for name, parameter in layer.named_parameters()}
        for module in layer.modules():
            # Exact types only: a subclass may use its weight differently, so its gradient is left to autograd.
            if type(module) in (nn.Linear, Conv1D) and (name := names.get(module.weight)):
                self.names.add(name)
                self._handles.append(module.register_forward_hook(self._hook_for(name), with_kwargs=True))

    def finish(self) -> None:
        """Reports groups with missing output gradients: outputs that the loss does not depend on contribute 0."""
        for group in dict.fromkeys(self._by_name.values()):
            self._conclude(group)

    def remove(self) -> None:
        """Removes the hooks and frees all stored tensors."""
        for handle in self._handles:
            handle.remove()
        self._by_input.clear()
        self._by_name.clear()

    def _hook_for(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            if self._batch is not self._current[0]:
                self.finish()
                self._batch = self._current[0]
            inputs = args[0] if args else next(iter(kwargs.values()))
            self._expect(name, inputs)
            if not output.requires_grad:  # embeddings have no gradient, and maybe no earlier parameter has one
                output.requires_grad_(True)
            key = id(inputs)  # not the tensor: the autograd graph, which outlives the group, keeps the closure alive
            output.register_hook(lambda gradient: self._arrived(name, key, gradient))

        return hook

    def _expect(self, name: str, inputs: torch.Tensor) -> None:
        """Registers a use of a weight: merges the group of its input and the group of the weight's earlier uses."""
        group = self._by_input.setdefault(id(inputs), _Group())
        earlier = self._by_name.get(name)
        if earlier is not None and earlier is not group:
            earlier.absorb(group)
            self._by_input.update(dict.fromkeys(group.inputs, earlier))
            self._by_name.update(dict.fromkeys(group.gradients, earlier))
            group = earlier
        self._by_input[id(inputs)] = self._by_name[name] = group
        group.inputs[id(inputs)] = inputs
        group.gradients.setdefault(name, {})
        group.waiting += 1

    def _arrived(self, name: str, key: int, gradient: torch.Tensor) -> None:
        group = self._by_name[name]
        gradients = group.gradients[name]
        gradients[key] = gradients[key] + gradient if key in gradients else gradient
        group.waiting -= 1
        if group.waiting == 0:
            self._conclude(group)

    def _conclude(self, group: _Group) -> None:
        for key in group.inputs:  # the id of a freed tensor can be reused
            del self._by_input[key]
        for name in group.gradients:
            del self._by_name[name]
        if any(group.gradients.values()):
            assert self._batch is not None
            with torch.no_grad():
                squared = linear_squared_norm(*group.joined(self._batch.size), self._norms)
            self._report(self._batch, next(iter(group.gradients)), squared)


class _Group:
    """Linear layers whose weight gradients are computed from the same inputs.

    Attributes:
        inputs: Inputs by id; several if a weight was used more than once.
        gradients: Output gradients by the weight's name and the input's id.
        waiting: Number of output gradients that have not arrived yet.
    """

    def __init__(self) -> None:
        self.inputs: dict[int, torch.Tensor] = {}
        self.gradients: dict[str, dict[int, torch.Tensor]] = {}
        self.waiting = 0

    def absorb(self, other: _Group) -> None:
        self.inputs.update(other.inputs)
        self.gradients.update(other.gradients)
        self.waiting += other.waiting

    def joined(self, size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The inputs and each weight's output gradients, ``[size, tokens, width]``, concatenated over inputs along the tokens."""
        gradients = []
        for of_weight in self.gradients.values():
            if of_weight:
                known = next(iter(of_weight.values()))
                missing = {
                    key: known.new_zeros(*entered.shape[:-1], known.shape[-1])
                    for key, entered in self.inputs.items()
                    if key not in of_weight
                }
                gradients.append(_joined([(of_weight | missing)[key] for key in self.inputs], size))
        inputs = [entered.detach().to(gradients[0].device) for entered in self.inputs.values()]
        return _joined(inputs, size), gradients


def _joined(parts: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Concatenates along the tokens: ``[size, tokens, width]``. A module may flatten sequences and tokens into one dimension."""
    rows = [part.reshape(size, -1, part.shape[-1]) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
