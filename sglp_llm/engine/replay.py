"""Runs the decoder layers of a model one by one, each with the arguments that the model itself would give it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

from sglp_llm.engine.modes import entering_states, leaving_states
from sglp_llm.models.loading import DecoderModel


@dataclass(frozen=True)
class Call:
    """What a model hands to one decoder layer beside the hidden states: masks, rotary embeddings, and so on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Replay:
    """One batch of sequences, ready to go through any of the decoder layers in any order.

    The model runs once with its layers handing on what they receive, which records each layer's own arguments: they differ by
    layer (sliding windows) and do not depend on the hidden states. Replaying all layers in order is bit for bit the model.

    Args:
        model: The model.
        ids: ``[batch, tokens]`` on the model's input device.
        mask: ``[batch, tokens]`` bool, or ``None`` without padding.

    Attributes:
        ids: The token ids.
        mask: As it was given.
        first_states: ``[batch, tokens, hidden]``: what enters layer 0.
    """

    def __init__(self, model: DecoderModel, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        self._model, self.ids, self.mask = model, ids, mask
        self._calls: list[Call] = []
        seen: list[torch.Tensor] = []

        def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            states: torch.Tensor = entering_states(args, kwargs)
            seen.append(states)
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            self._calls.append(Call(args[1:], rest))
            return states

        with _layers_replaced(model, [record] * model.num_layers):
            model.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        self.first_states = seen[0]

    def layer(
        self, index: int, states: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """What leaves a decoder layer, ``[batch, tokens, hidden]``, when ``states`` of the same shape enter it.

        Args:
            index: Which one.
            states: What enters.
            weights: Tensors that stand in for parameters of the layer, by their names in it.
        """
        call, layer = self._calls[index], self._model.layers[index]
        if weights:
            output = torch.func.functional_call(layer, dict(weights), (states, *call.args), call.kwargs)
        else:
            output = layer(states, *call.args, **call.kwargs)
        result: torch.Tensor = leaving_states(output)
        return result

    def layers(self, start: int, removed: frozenset[int], states: torch.Tensor) -> torch.Tensor:
        """Runs the layers from ``start`` to the last, without the removed ones."""
        for index in range(start, self._model.num_layers):
            if index not in removed:
                states = self.layer(index, states)
        return states

    def logits(self, states: torch.Tensor, positions: slice = slice(None)) -> torch.Tensor:
        """``[batch, tokens, vocabulary]``: final norm, head and whatever else the family has behind its last layer.

        Args:
            states: ``[batch, tokens, hidden]``, of these positions alone.
            positions: Which ones.
        """
        mask = None if self.mask is None else self.mask[:, positions]
        # Of the tokens only their number matters behind the layers: one embedding is looked up, not thousands.
        ids = torch.zeros_like(self.ids[:, positions])
        with _layers_replaced(self._model, [lambda args, kwargs: states] * self._model.num_layers):
            logits: torch.Tensor = self._model.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits

    def with_ids(self, ids: torch.Tensor) -> Replay:
        """The same layer arguments for other sequences of the same shape, without padding; `first_states` is not theirs."""
        assert self.mask is None
        assert ids.shape == self.ids.shape
        other = copy(self)
        other.ids = ids
        return other

    @property
    def vocabulary(self) -> int:
        """Logits a token."""
        return int(self._model.model.config.vocab_size)


@contextmanager
def _layers_replaced(model: DecoderModel, functions: list[Any]) -> Iterator[None]:
    """Inside the block each decoder layer is a function of its arguments that returns hidden states."""
    layers = list(model.layers)
    before = [vars(layer).get("forward") for layer in layers]
    for layer, function in zip(layers, functions, strict=True):
        vars(layer)["forward"] = lambda *args, _function=function, **kwargs: _function(args, kwargs)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = forward
