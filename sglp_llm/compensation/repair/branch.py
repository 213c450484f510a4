"""Captures a branch's output in a decoder layer, and folds a matrix that multiplies it into the branch's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sglp_llm.adapters import Branch
from sglp_llm.errors import UserError
from sglp_llm.method.exact import exact


@contextmanager
def branch_inputs(layer: nn.Module, branch: Branch) -> Iterator[list[Tensor]]:
    """Inside the block the list holds what the branch's last linear gets in the layer's last call."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[:] = [args[0].detach()]

    handle = layer.get_submodule(branch.last).register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def inputs_of(layer: nn.Module, branch: Branch) -> int:
    """Number of inputs of the branch's last linear."""
    owner: Any = layer.get_submodule(branch.last)
    return int(owner.weight.shape[0 if isinstance(owner, Conv1D) else 1])


def changed(layer: nn.Module, branch: Branch, change: Tensor) -> dict[str, Tensor]:
    """The new matrix of a branch's last linear.

    Args:
        layer: The decoder layer, in memory.
        branch: One of its branches, which ends in a linear.
        change: ``[inputs, outputs]``, added to the matrix.

    Returns:
        By the parameter's name in the layer, in its shape, float64.

    Raises:
        UserError: The layer is offloaded.
    """
    owner: Any = layer.get_submodule(branch.last)
    weight: Tensor = owner.weight.detach()
    refuse_offloaded(weight)
    turned = change if isinstance(owner, Conv1D) else change.T
    own = exact(weight)
    return {f"{branch.last}.weight": (own + turned.to(own.device)).contiguous()}


@contextmanager
def branch_outputs(layer: nn.Module, branch: Branch) -> Iterator[list[Tensor]]:
    """Inside the block the list holds the branch's output in the layer's last call; its leading dimensions may be any."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        seen[:] = [output.detach()]

    handle = layer.get_submodule(branch.output).register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def folded(layer: nn.Module, branch: Branch, factor: Tensor) -> dict[str, Tensor]:
    """New values of a branch's last parameters, such that its output is multiplied by a matrix.

    Args:
        layer: The decoder layer, in memory.
        branch: One of its branches.
        factor: ``[D, D]``, which multiplies rows from the right, or ``[D]``, one factor per channel. For a norm only ``[D]``.

    Returns:
        By the parameter's name in the layer, in its shape, float64.

    Raises:
        UserError: The layer is offloaded, or the branch's last module has no weights.
    """
    owner: Any = layer
    for name in branch.last.split("."):
        owner = getattr(owner, name)
    if isinstance(owner, nn.Parameter):
        refuse_offloaded(owner)
        return {branch.last: torch.stack([_times(matrix, factor, 0) for matrix in owner.detach()])}
    axis = 1 if isinstance(owner, Conv1D) else 0
    values = {}
    for name, parameter in owner.named_parameters(recurse=False):
        refuse_offloaded(parameter)
        value = parameter.detach()
        offset = branch.offset if name == "weight" else 0.0
        values[f"{branch.last}.{name}"] = _times(exact(value) + offset, factor, axis if value.ndim > 1 else 0) - offset
    if not values:
        raise UserError(
            f"{branch.last} has no weights in this model: there is nothing that a compensation could be folded into"
        )
    return values


def refuse_offloaded(parameter: Tensor) -> None:
    """Rejects a parameter that accelerate has offloaded.

    Raises:
        UserError: The parameter is offloaded.
    """
    if parameter.device.type == "meta":
        raise UserError(
            "the model does not fit: a part of it was offloaded, and a compensation needs every layer on a device; "
            "use --engine streamed, or a larger machine"
        )


def _times(value: Tensor, factor: Tensor, axis: int) -> Tensor:
    """Multiplies a parameter by ``factor`` along ``axis``, its axis of output channels."""
    rows = exact(value).movedim(axis, -1)
    factor = factor.to(rows.device)
    return (rows @ factor if factor.ndim > 1 else rows * factor).movedim(-1, axis).contiguous()
