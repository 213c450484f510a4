"""What an engine shows while it runs: the interface between the pass and everything that is computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Flag, auto

import torch

from sglp_llm.processes import Processes


class Need(Flag):
    """What an observer wants to see. An engine runs the union of all observers' needs once."""

    NOTHING = 0
    WEIGHTS = auto()
    HIDDEN_STATES = auto()
    GRADIENTS = auto()
    GRADIENT_NORMS = auto()
    STATE_GRADIENTS = auto()
    TRIALS = auto()
    BACKWARD = GRADIENTS | GRADIENT_NORMS | STATE_GRADIENTS


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

    Hidden states come batch by batch, and in a batch layer by layer, front to back. Gradients come in an order that is the
    engine's business: all of a layer's, then ``on_gradients_end`` for that layer.

    Layers of one model may live on different devices, so reduce each layer where it is and move the small result.

    Attributes:
        needs: What it wants to see.
        together: How many consecutive calibration sequences (a multiple of it after the first) one process must see.
    """

    needs: Need = Need.NOTHING
    together: int = 1

    def on_weight(self, layer: int, weight: torch.Tensor) -> None:
        """One parameter of a decoder layer, once (`Need.WEIGHTS`); every process sees all of them."""

    def on_layer(self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        """The hidden states around a decoder layer, both ``[batch, tokens, hidden]`` (`Need.HIDDEN_STATES`)."""

    def on_batch_end(self, batch: Batch) -> None:
        """Every layer's hidden states of these sequences have been shown (`Need.HIDDEN_STATES`)."""

    def on_gradient(self, layer: int, batch: Batch, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """The gradient of one sequence's mean loss by one parameter of a layer, same shape as it (`Need.GRADIENTS`).

        ``name`` is the parameter's inside its layer. The gradient is freed when this returns.
        """

    def on_gradient_norm(self, layer: int, batch: Batch, name: str, squared: torch.Tensor) -> None:
        """The square of that gradient's Frobenius norm, a float64 scalar (`Need.GRADIENT_NORMS`).

        For those who need no more than that: the gradient itself need not exist. One call may stand for several parameters
        of the layer, under the name of the first: only the sum over all calls for a layer and a sequence is defined.
        """

    def on_state_gradient(
        self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        """The gradient of one sequence's mean loss by what leaves a decoder layer (`Need.STATE_GRADIENTS`).

        All three are ``[1, tokens, hidden]``; the gradient is freed when this returns.
        """

    def on_gradients_end(self, layer: int, weights: Mapping[str, torch.Tensor], processes: Processes) -> None:
        """Every sequence's gradients of this layer were shown; called for every layer, in the same order in every process.

        Args:
            layer: Which one.
            weights: Its parameters by the names that `on_gradient` gave.
            processes: For sums over the sequences that others have seen. A process may have seen none.
        """

    def on_pass_end(self, processes: Processes) -> None:
        """The pass is over; called once, in every process: sums of what each has seen become sums over all sequences."""
