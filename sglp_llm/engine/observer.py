"""The observer interface: what a pass provides to everything that is computed from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto

import torch

from sglp_llm.processes import Processes


class Need(Flag):
    """What an observer needs from a pass. An engine runs one pass for the union of all observers' needs."""

    NOTHING = 0
    WEIGHTS = auto()
    HIDDEN_STATES = auto()
    GRADIENTS = auto()
    GRADIENT_NORMS = auto()
    STATE_GRADIENTS = auto()
    SYNAPTIC_FLOW = auto()
    TRIALS = auto()
    BACKWARD = GRADIENTS | GRADIENT_NORMS | STATE_GRADIENTS


@dataclass(frozen=True)
class Batch:
    """The calibration sequences of one step.

    Attributes:
        first: Index of the first sequence in the calibration set.
        size: Number of sequences; 1 in a pass that shows whole gradients.
        mask: ``[size, tokens]`` bool on the host, False at padding; ``None`` when there is no padding.
    """

    first: int
    size: int
    mask: torch.Tensor | None
    _moved: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def mask_on(self, device: torch.device) -> torch.Tensor | None:
        """The mask on a device; moved to each once, and nobody waits for it."""
        if self.mask is None:
            return None
        if device not in self._moved:
            self._moved[device] = self.mask.to(device, non_blocking=True)
        return self._moved[device]

    def real(self, values: torch.Tensor) -> torch.Tensor:
        """Values of every position, ``[size, tokens, ...]``, with 0 at padding."""
        mask = self.mask_on(values.device)
        return values if mask is None else torch.where(mask.view(*mask.shape, *[1] * (values.ndim - 2)), values, 0)

    def positions(self, tokens: int) -> list[int]:
        """The number of real positions of each sequence of so many tokens, padding included."""
        return [tokens] * self.size if self.mask is None else self.mask.sum(dim=1).tolist()


class Observer:
    """Receives callbacks during one pass; override those that ``needs`` declares. Tensors belong to the engine: copy to keep.

    Hidden states arrive batch by batch, and within a batch layer by layer, front to back. The order of gradients depends on the
    engine; ``on_gradients_end`` of a layer follows all gradients of that layer.

    Layers of one model may be on different devices, so reduce each layer on its own device. Moving a number to the host waits for
    the device: add up there (`sglp_llm.engine.totals.LayerTotals`), and move what is left at the end.

    Attributes:
        needs: What it needs from the pass.
        together: Group size of consecutive calibration sequences, counted from the first, that one process must see whole.
    """

    needs: Need = Need.NOTHING
    together: int = 1

    def on_weight(self, layer: int, weight: torch.Tensor) -> None:
        """One parameter of a decoder layer, called once for each (`Need.WEIGHTS`); every process sees all parameters."""

    def on_synaptic_flow(self, flows: Sequence[float]) -> None:
        """Called once with one number per layer, the same in every process (`Need.SYNAPTIC_FLOW`; see `synaptic_flow.py`)."""

    def on_layer(self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        """The hidden states that enter and leave a decoder layer, both ``[batch, tokens, hidden]`` (`Need.HIDDEN_STATES`)."""

    def on_batch_end(self, batch: Batch) -> None:
        """Called after `on_layer` of all layers for these sequences (`Need.HIDDEN_STATES`)."""

    def on_gradient(self, layer: int, batch: Batch, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """The gradient of one sequence's mean loss with respect to one parameter, in its shape (`Need.GRADIENTS`).

        ``name`` is the parameter's name in its layer. The gradient is freed when this returns.
        """

    def on_gradient_norm(self, layer: int, batch: Batch, name: str, squared: torch.Tensor) -> None:
        """The square of that gradient's Frobenius norm for each sequence, ``[batch]`` float64 (`Need.GRADIENT_NORMS`).

        Cheaper than `on_gradient`, because the gradient itself need not be computed. One call may cover several parameters of the
        layer, under the name of the first: only the sum over all calls for a layer and a sequence is defined.
        """

    def on_state_gradient(
        self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        """The gradient of each sequence's mean loss with respect to the states leaving a layer (`Need.STATE_GRADIENTS`).

        All three are ``[batch, tokens, hidden]``; the gradient is freed when this returns.
        """

    def on_gradients_end(self, layer: int, weights: Mapping[str, torch.Tensor], processes: Processes) -> None:
        """Called once per layer after the gradients of all sequences, in the same order of layers in every process.

        Args:
            layer: Index of the layer.
            weights: Its parameters, with the names that `on_gradient` uses.
            processes: For sums over the sequences of all processes. A process may have seen no sequence.
        """

    def on_pass_end(self, processes: Processes) -> None:
        """Called once in every process after the pass: the place to sum over processes (a collective call)."""
