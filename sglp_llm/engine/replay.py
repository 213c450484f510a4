"""Runs the decoder layers of a model one by one, each with the arguments that the model itself would pass."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils._pytree import tree_leaves

from sglp_llm.engine.modes import entering_states, forwards_replaced, leaving_states
from sglp_llm.engine.tail import tail_of
from sglp_llm.errors import UserError
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating, products_in_bfloat16


@dataclass(frozen=True)
class Call:
    """The arguments of one decoder layer other than the hidden states: attention mask, rotary embeddings, and so on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Replay:
    """One batch of sequences that can be run through any of the decoder layers, in any order.

    The model runs once with decoder layers that only return their input, to record each layer's arguments. These differ by layer
    (sliding windows) and do not depend on the hidden states. Replaying all layers in order is bitwise equal to the model; of a
    derived family this is checked first.

    Args:
        model: The model.
        ids: ``[batch, tokens]`` on the model's input device.
        mask: ``[batch, tokens]`` bool, or ``None`` without padding.
        bfloat16: Multiply matrices in bfloat16, whatever the model's dtype.

    Raises:
        UserError: See `outputs_of`.

    Attributes:
        ids: The token ids.
        mask: The mask.
        first_states: ``[batch, tokens, hidden]``: the hidden states that enter layer 0.
    """

    def __init__(
        self, model: DecoderModel, ids: torch.Tensor, mask: torch.Tensor | None, bfloat16: bool = False
    ) -> None:
        self._model, self.ids, self.mask, self._bfloat16 = model, ids, mask, bfloat16
        self._outputs = outputs_of(model, ids)
        self._calls, self.first_states = recorded_calls(model, ids, mask, self._outputs, self._products())

    def layer(
        self, index: int, states: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Runs one decoder layer; returns the hidden states that leave it, ``[batch, tokens, hidden]``.

        Args:
            index: Index of the layer.
            states: The hidden states that enter it, of the same shape.
            weights: Tensors to use in place of parameters of the layer, by name in the layer.
        """
        call, layer = self._calls[index], self._model.layers[index]
        with self._products():
            if weights:
                output = torch.func.functional_call(layer, dict(weights), (states, *call.args), call.kwargs)
            else:
                output = layer(states, *call.args, **call.kwargs)
        result: torch.Tensor = leaving_states(output)
        return result

    def layers(self, start: int, removed: frozenset[int], states: torch.Tensor) -> torch.Tensor:
        """Runs the layers from ``start`` to the last one, without the removed layers."""
        for index in range(start, self._model.num_layers):
            if index not in removed:
                states = self.layer(index, states)
        return states

    def logits(self, states: torch.Tensor, positions: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """``[batch, tokens, vocabulary]``: applies final norm, head and whatever else the family has after its last layer.

        Args:
            states: ``[batch, tokens, hidden]`` at these positions only.
            positions: The positions, as a range or as indices.
        """
        with self._products():
            if modules := tail_of(self._model, states, self._by_the_model):
                for module in modules:
                    states = module(states)
                return states
            return self._by_the_model(states, positions)

    def _by_the_model(self, states: torch.Tensor, positions: slice | torch.Tensor | None = None) -> torch.Tensor:
        positions = slice(states.shape[1]) if positions is None else positions
        # After the layers neither mask nor ids matter: id 0 throughout reads one row of the embedding matrix.
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=self.ids.device)
        mask = None if self.mask is None else self.mask[: len(states), positions]
        returns = [lambda args, kwargs: _as_output(states, self._outputs)] * self._model.num_layers
        with forwards_replaced(self._model.layers, returns):
            logits: torch.Tensor = self._model.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits

    def _products(self) -> AbstractContextManager[object]:
        return products_in_bfloat16(self.ids.device, self._bfloat16)

    def with_ids(self, ids: torch.Tensor) -> Replay:
        """The same layer arguments for other sequences of the same shape, without padding; `first_states` is not updated."""
        assert self.mask is None
        assert ids.shape == self.ids.shape
        other = copy(self)
        other.ids = ids
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of what it keeps; masks are tokens x tokens."""
        kept = [self.first_states, *tree_leaves([(call.args, call.kwargs) for call in self._calls])]
        return sum({id(each): each.nbytes for each in kept if isinstance(each, torch.Tensor)}.values())

    @property
    def vocabulary(self) -> int:
        """Number of logits per token."""
        return int(self._model.config.vocab_size)


def recorded_calls(
    model: DecoderModel,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    outputs: int,
    context: AbstractContextManager[object],
) -> tuple[list[Call], torch.Tensor]:
    """The arguments of each decoder layer when no layer changes the hidden states, and the states that enter layer 0."""
    calls: list[Call] = []
    seen: list[torch.Tensor] = []

    def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states: torch.Tensor = entering_states(args, kwargs)
        seen.append(states)
        calls.append(Call(args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))
        return _as_output(states, outputs)

    with forwards_replaced(model.layers, [record] * model.num_layers), context:
        model.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return calls, seen[0]


def outputs_of(model: DecoderModel, ids: torch.Tensor) -> int:
    """How many values a decoder layer returns in a tuple; 0 where it returns the hidden states alone.

    Of a derived family it is seen in a forward pass over a few tokens, in which is also checked that the layers give the same
    one by one: some hand on more than hidden states.

    Args:
        model: The model.
        ids: ``[batch, tokens]`` on the model's input device.

    Raises:
        UserError: They do not; or see `check_states`.
    """
    if not model.adapter.is_derived:
        return 0
    seen = _seen(model, ids)
    if not seen.one_by_one:
        raise UserError(
            f"the layers of a {model.model.config.model_type} model cannot be run one by one, because they hand on more than "
            "hidden states: trials, compensation and the streamed engine do not work; --criterion sglp with --compensate none "
            "and --engine resident does"
        )
    return seen.outputs


def check_states(model: DecoderModel, ids: torch.Tensor) -> None:
    """Checks that the layers of a derived family pass on one vector of hidden states a token, which criteria look at.

    Args:
        model: The model.
        ids: ``[batch, tokens]`` on the model's input device.

    Raises:
        UserError: They pass on something else.
    """
    if model.adapter.is_derived:
        _seen(model, ids)


@dataclass(frozen=True)
class _Seen:
    outputs: int
    one_by_one: bool


_SEEN: WeakKeyDictionary[Any, _Seen] = WeakKeyDictionary()
_CHECKED_TOKENS = 32
_CLOSE = 1e-3  # of the largest number; recurrent layers may round differently


def _seen(model: DecoderModel, ids: torch.Tensor) -> _Seen:
    if model.model not in _SEEN:
        with torch.no_grad(), evaluating(model.model):
            _SEEN[model.model] = _look(model, ids[:1, :_CHECKED_TOKENS])
    return _SEEN[model.model]


def _look(model: DecoderModel, ids: torch.Tensor) -> _Seen:
    left: list[Any] = []
    handles = [layer.register_forward_hook(lambda _, args, output: left.append(output)) for layer in model.layers]
    try:
        model.model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    shapes = {tuple(leaving_states(output).shape) for output in left}
    width = min(shapes)[-1]
    if shapes != {(*ids.shape, width)} or len(left) != model.num_layers:
        kind, shown = model.model.config.model_type, ", ".join(str(list(shape)) for shape in sorted(shapes))
        raise UserError(
            f"the layers of a {kind} model cannot be analysed: for {list(ids.shape)} tokens they pass on hidden states of shape "
            f"{shown}, not one vector a token; choose layers yourself, with --plan"
        )
    outputs = len(left[0]) if isinstance(left[0], tuple | list) else 0
    try:
        calls, states = recorded_calls(model, ids, None, outputs, nullcontext())
        for call, layer in zip(calls, model.layers, strict=True):
            states = leaving_states(layer(states, *call.args, **call.kwargs))
    except Exception:  # whatever a type's own code raises for what it did not get
        return _Seen(outputs, False)
    whole = leaving_states(left[-1])
    return _Seen(outputs, bool((states - whole).abs().max() <= _CLOSE * whole.abs().max()))


def _as_output(states: torch.Tensor, outputs: int) -> Any:
    return (states, *[None] * (outputs - 1)) if outputs else states
