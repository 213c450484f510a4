"""Watches the linears of a decoder layer, so that a backward pass gives the norms of their weight gradients without these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sglp_llm.engine.ghost import Norms, linear_squared_norm
from sglp_llm.engine.observer import Batch

Report = Callable[[Batch, str, torch.Tensor], None]
"""Told the sequence, a weight's name and the squared norm of a group of weights' gradients."""


class WatchedLinears:
    """Keeps what enters the linears of one decoder layer and the gradients of what leaves them, until a norm is made of both.

    Their weights should take no gradient meanwhile. A linear is taken to use its weight only when it is called. Inputs are
    kept from the forward pass on, as autograd would for the weight's gradient; both are freed when every gradient that
    belongs to an input has come.

    Args:
        layer: The decoder layer.
        current: Holds the one sequence that is under way.
        report: Called once a group: linears that had the same input, and linears whose weight ran more than once.
        norms: ``auto``, ``ghost`` or ``direct``.
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
            # Subclasses may do anything with their weight; autograd knows what.
            if type(module) in (nn.Linear, Conv1D) and (name := names.get(module.weight)):
                self.names.add(name)
                self._handles.append(module.register_forward_hook(self._hook_for(name), with_kwargs=True))

    def finish(self) -> None:
        """Reports the groups of which a gradient never came: what is not on the path of the loss adds nothing to it."""
        for group in dict.fromkeys(self._by_name.values()):
            self._conclude(group)

    def remove(self) -> None:
        """Watches no longer, and forgets what was kept."""
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
            if not output.requires_grad:  # embeddings take no gradient, and perhaps nothing that does stands before
                output.requires_grad_(True)
            key = id(inputs)  # not the tensor: autograd's graph, which outlives the group, holds this
            output.register_hook(lambda gradient: self._arrived(name, key, gradient))

        return hook

    def _expect(self, name: str, inputs: torch.Tensor) -> None:
        """A weight runs: it belongs to those with the same input, and to those it has run with before."""
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
        for key in group.inputs:  # the id of a tensor that is gone can be another's
            del self._by_input[key]
        for name in group.gradients:
            del self._by_name[name]
        if any(group.gradients.values()):
            assert self._batch is not None
            with torch.no_grad():
                squared = linear_squared_norm(*group.joined(), self._norms)
            self._report(self._batch, next(iter(group.gradients)), squared)


class _Group:
    """Linears whose weight gradients are made of the same tokens.

    Attributes:
        inputs: What entered, by id; more than one where a weight ran more than once.
        gradients: Of what left, by weight and by the id of what entered.
        waiting: How many of them have not come yet.
    """

    def __init__(self) -> None:
        self.inputs: dict[int, torch.Tensor] = {}
        self.gradients: dict[str, dict[int, torch.Tensor]] = {}
        self.waiting = 0

    def absorb(self, other: _Group) -> None:
        self.inputs.update(other.inputs)
        self.gradients.update(other.gradients)
        self.waiting += other.waiting

    def joined(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The input ``[tokens, in]`` and each weight's gradient ``[tokens, out]``, several inputs one after the other."""
        gradients = []
        for of_weight in self.gradients.values():
            if of_weight:
                known = next(iter(of_weight.values()))
                missing = {
                    key: known.new_zeros(*entered.shape[:-1], known.shape[-1])
                    for key, entered in self.inputs.items()
                    if key not in of_weight
                }
                gradients.append(_joined([(of_weight | missing)[key] for key in self.inputs]))
        inputs = [entered.detach().to(gradients[0].device) for entered in self.inputs.values()]
        return _joined(inputs), gradients


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[tokens, width]``."""
    rows = [part.flatten(0, -2) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
