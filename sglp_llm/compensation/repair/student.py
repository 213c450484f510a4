"""The student: the shortened model with trainable copies of some parameters; the whole model's weights are not changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sglp_llm.compensation.repair.branch import refuse_offloaded
from sglp_llm.engine.replay import Replay
from sglp_llm.engine.streamed import layer_in_memory
from sglp_llm.models.loading import DecoderModel


class Student:
    """The kept layers from the first one with replaced or trainable parameters on.

    Args:
        model: The whole model, resident or streamed.
        removed: The removed layers.
        names: Trainable parameters, of kept layers, by name in the model.
        start: Initial values of some parameters of kept layers, whether trainable or not.

    Attributes:
        first: The first layer with replaced or trainable parameters.
        values: The trainable values by name, float32.

    Raises:
        UserError: A layer is offloaded.
    """

    def __init__(
        self, model: DecoderModel, removed: Sequence[int], names: Sequence[str], start: Mapping[str, Tensor]
    ) -> None:
        self._model = model
        self.values: dict[str, Tensor] = {}
        self._standing_in: dict[int, dict[str, Tensor]] = {}  # by layer and the parameter's name in it
        for index, members in groupby(sorted(dict.fromkeys((*names, *start)), key=self._layer_of), self._layer_of):
            prefix, self._standing_in[index] = f"{model.adapter.layers}.{index}.", {}
            with layer_in_memory(model, index) as layer:
                for name in members:
                    own = layer.get_parameter(name.removeprefix(prefix))
                    refuse_offloaded(own)
                    value = start.get(name, own).detach().to(own.device)
                    if name in names:
                        value = self.values[name] = value.to(torch.float32, copy=True).requires_grad_(True)
                    self._standing_in[index][name.removeprefix(prefix)] = value
        self.first = min(self._standing_in)
        self._kept = [layer for layer in range(self.first, model.num_layers) if layer not in removed]

    def final(self, replay: Replay, states: Tensor) -> Tensor:
        """The hidden states that leave the last layer with the current values; streamed layers use activation checkpointing.

        Args:
            replay: The replay of the sequences.
            states: The hidden states that enter layer ``first``, ``[batch, tokens, hidden]``.
        """
        dtype = self._model.model.dtype
        for index in self._kept:

            def through(entering: Tensor, index: int = index) -> Tensor:
                with layer_in_memory(self._model, index) as layer:
                    layer.requires_grad_(False)
                    values = {name: value.to(dtype) for name, value in self._standing_in.get(index, {}).items()}
                    return replay.layer(index, entering, values)

            if self._model.weights is not None and torch.is_grad_enabled():
                states = checkpoint(through, states, use_reentrant=False, preserve_rng_state=False)
            else:
                states = through(states)
        return states

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the values on the CPU."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self.values.items()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Sets the values to those of a snapshot."""
        for name, value in self.values.items():
            value.data.copy_(snapshot[name])

    def _layer_of(self, name: str) -> int:
        return int(name.removeprefix(f"{self._model.adapter.layers}.").partition(".")[0])
