"""What an engine shows while it runs: the interface between the pass and everything that is computed from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto
from typing import ClassVar

import torch


class Need(Flag):
    """What an observer wants to see. An engine runs the union of all observers' needs once."""

    NOTHING = 0
    WEIGHTS = auto()
    HIDDEN_STATES = auto()
    GRADIENTS = auto()
    TRIALS = auto()


@dataclass(frozen=True)
class Batch:
    """The calibration sequences of one step.

    Attributes:
        first: Index of the first of them in the calibration set.
        size: How many there are; always 1 in a pass that takes gradients.
        mask: ``[size, tokens]`` bool, False at padding; ``None`` when there is no padding.
    """

    first: int
    size: int
    mask: torch.Tensor | None


class Observer:
    """Watches one pass; override what ``needs`` announces. Tensors belong to the engine: copy what you keep.

    Layers of one model may live on different devices, so reduce each layer where it is and move the small result.
    """

    needs: ClassVar[Need] = Need.NOTHING

    def on_weight(self, layer: int, weight: torch.Tensor) -> None:
        """One parameter of a decoder layer, once before the pass (`Need.WEIGHTS`)."""

    def on_layer(self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        """The hidden states around a decoder layer, both ``[batch, tokens, hidden]`` (`Need.HIDDEN_STATES`)."""

    def on_gradient(self, layer: int, batch: Batch, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """The gradient of one sequence's mean loss by one parameter of a layer, same shape as it (`Need.GRADIENTS`).

        ``name`` is the parameter's inside its layer. The gradient is freed when this returns.
        """

    def on_batch_end(self, batch: Batch) -> None:
        """Everything about these sequences has been shown."""
