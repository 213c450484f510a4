"""The engine for a model that does not fit in memory: it loads one decoder layer at a time and runs all sequences through it.

The forward pass goes front to back, then the loss is computed. The backward pass goes back to front and recomputes each layer
from the hidden states that entered it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from sglp_llm.calibration import CalibrationSet
from sglp_llm.engine.gradients import end_gradients, sequences_a_step, watched_gradients
from sglp_llm.engine.head import loss_and_gradient
from sglp_llm.engine.loss import not_finite
from sglp_llm.engine.norms.ghost import Norms
from sglp_llm.engine.observer import Batch, Need, Observer
from sglp_llm.engine.replay import Replay
from sglp_llm.engine.resident import batches, show_weights
from sglp_llm.engine.settings import DEFAULTS, PassSettings
from sglp_llm.engine.states import StateStore, state_store
from sglp_llm.errors import UserError
from sglp_llm.models.devices import free_on
from sglp_llm.models.heap import trim
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating
from sglp_llm.processes import Processes

_MASK_SHARE = 16  # of which one part of a device's free memory may hold the masks of padded steps

_LOSS = "loss"  # the slot of the loss gradient with respect to the hidden states between two layers


@dataclass(frozen=True)
class Step:
    """A batch of sequences that run through a layer together: ``[batch, tokens]``; the mask is None without padding."""

    batch: Batch
    ids: torch.Tensor
    mask: torch.Tensor | None


class Replays:
    """The arguments of every layer for every step.

    Without padding they are the same for all steps of one shape. With padding each step has its own masks, of size tokens x
    tokens. These are recomputed when needed, at the cost of a forward pass without layers; on a GPU, which the host would wait
    for each time, they are kept while they take a small share of its free memory.
    """

    def __init__(self, model: DecoderModel, bfloat16: bool = False) -> None:
        self._model, self._bfloat16 = model, bfloat16
        self._plain: dict[torch.Size, Replay] = {}
        self._padded: dict[int, Replay] = {}
        self._room = (free_on(model.input_device) or 0) // _MASK_SHARE

    def first_states(self, step: Step) -> torch.Tensor:
        """The hidden states that enter layer 0, ``[batch, tokens, hidden]``."""
        if step.mask is not None:
            return self._of_padded(step).first_states
        replay = Replay(self._model, step.ids, None, self._bfloat16)
        self._plain.setdefault(step.ids.shape, replay)
        return replay.first_states

    def of(self, step: Step) -> Replay:
        """A `Replay` that runs layers and the head on this step; after `first_states` of a step of this shape."""
        if step.mask is None:
            return self._plain[step.ids.shape].with_ids(step.ids)
        return self._of_padded(step)

    def _of_padded(self, step: Step) -> Replay:
        if (known := self._padded.get(step.batch.first)) is not None:
            return known
        replay = Replay(self._model, step.ids, step.mask, self._bfloat16)
        if replay.nbytes <= self._room:
            self._room -= replay.nbytes
            self._padded[step.batch.first] = replay
        return replay


def run_streamed(
    model: DecoderModel,
    calibration: CalibrationSet,
    observers: Sequence[Observer],
    settings: PassSettings = DEFAULTS,
) -> float | None:
    """Like `sglp_llm.engine.resident.run_pass`, for a model with streamed layers; the results are the same.

    The hidden states of all layers, ``[layers + 1, sequences, tokens, hidden]`` in the model's dtype, are stored in host memory
    or in the model's scratch folder.

    Raises:
        UserError: The loss is not finite (the message names the first layer whose output is not).
    """
    needs = Need.NOTHING
    for observer in observers:
        needs |= observer.needs
    differentiate = bool(needs & Need.BACKWARD)
    forward = differentiate or Need.HIDDEN_STATES in needs
    if not forward and Need.WEIGHTS not in needs:
        return _end(observers, settings.processes, None)
    assert model.weights is not None
    share = settings.processes.share(
        len(calibration.input_ids), math.lcm(*(observer.together for observer in observers))
    )
    size = sequences_a_step(model, needs, settings, calibration.input_ids.shape[1])
    steps = steps_of(model, calibration, size, share) if forward else []
    replays = Replays(model)
    work = model.num_layers * ((1 if forward else 0) + (2 if differentiate else 0))
    loss = None
    with (
        evaluating(model.model),
        state_store(model) as store,
        torch.no_grad(),
        settings.progress("Analysing", work or model.num_layers) as advance,
    ):
        for step in steps:
            store.put(0, step.batch, replays.first_states(step))
        model.weights.rest()
        for index, layer in layers_in_turn(model, range(model.num_layers)):
            show_weights(index, layer, observers)
            for step in steps:
                store.put(index + 1, step.batch, replays.of(step).layer(index, store.get(index, step.batch)))
            advance(1)
        _show_states(model, steps, store, observers)
        trim()  # returns the memory of CKA's kernel matrices before the head needs it
        if differentiate:
            total = settings.processes.sum(_loss(model, steps, replays, store))
            loss = float(total) / len(calibration.input_ids)
            store.drop(model.num_layers)
            model.weights.rest()
            trim()
            for index, layer in layers_in_turn(model, range(model.num_layers - 1, -1, -1)):
                _backward(index, layer, steps, replays, store, observers, settings.norms, size > 1)
                store.drop(index)
                end_gradients(index, layer, observers, settings.processes)
                advance(2)
    return _end(observers, settings.processes, loss)


def steps_of(
    model: DecoderModel, calibration: CalibrationSet, batch_size: int, share: range | None = None
) -> list[Step]:
    """The sequences of the share as steps."""
    return [Step(*step) for step in batches(calibration, batch_size, model.input_device, share)]


@contextmanager
def layer_in_memory(model: DecoderModel, index: int) -> Iterator[nn.Module]:
    """Inside the block a layer's weights are in memory, for a resident or a streamed model."""
    with nullcontext(model.layers[index]) if model.weights is None else model.weights.layer(index) as layer:
        yield layer


def layers_in_turn(model: DecoderModel, order: Iterable[int]) -> Iterator[tuple[int, nn.Module]]:
    """The layers in this order, in memory; each streamed layer is prefetched while the caller uses the one before."""
    if model.weights is None:
        yield from ((index, model.layers[index]) for index in order)
        return
    indices = list(order)
    try:
        for index, following in zip(indices, [*indices, None][1:], strict=True):
            with model.weights.layer(index, following) as layer:
                yield index, layer
    finally:
        model.weights.close()


def _end(observers: Sequence[Observer], processes: Processes, loss: float | None) -> float | None:
    for observer in observers:
        observer.on_pass_end(processes)
    return loss


def _show_states(model: DecoderModel, steps: Sequence[Step], store: StateStore, observers: Sequence[Observer]) -> None:
    watching = [observer for observer in observers if Need.HIDDEN_STATES in observer.needs]
    if not watching:
        return
    for step in steps:
        entering = store.get(0, step.batch)
        for index in range(model.num_layers):
            leaving = store.get(index + 1, step.batch)
            for observer in watching:
                observer.on_layer(index, step.batch, entering, leaving)
            entering = leaving
        for observer in watching:
            observer.on_batch_end(step.batch)


def _loss(model: DecoderModel, steps: Sequence[Step], replays: Replays, store: StateStore) -> torch.Tensor:
    """The sum of the sequences' losses, float64; stores their gradients with respect to the states leaving the last layer."""
    found = [torch.zeros(0, dtype=torch.float64)]
    for step in steps:
        losses, gradient = loss_and_gradient(replays.of(step), store.get(model.num_layers, step.batch))
        store.put(_LOSS, step.batch, gradient)
        found.append(losses)
    losses = torch.cat([each.to(found[-1].device) for each in found]).cpu()
    sequences = (step.batch.first + index for step in steps for index in range(step.batch.size))
    for sequence, loss in zip(sequences, losses.tolist(), strict=True):
        if not math.isfinite(loss):
            step = next(step for step in steps if sequence < step.batch.first + step.batch.size)
            raise _not_finite(model, step, sequence, store, loss)
    return losses.sum()


def _backward(
    index: int,
    layer: nn.Module,
    steps: Sequence[Step],
    replays: Replays,
    store: StateStore,
    observers: Sequence[Observer],
    norms: Norms,
    batched: bool,
) -> None:
    current: list[Batch] = []
    watching = [observer for observer in observers if Need.STATE_GRADIENTS in observer.needs]
    with watched_gradients({index: layer}, observers, current, norms, batched), torch.enable_grad():
        for step in steps:
            current[:] = [step.batch]
            entering = store.get(index, step.batch).detach().requires_grad_(True)
            leaving = replays.of(step).layer(index, entering)
            gradient = store.get(_LOSS, step.batch)
            with torch.no_grad():
                for observer in watching:
                    observer.on_state_gradient(index, step.batch, entering.detach(), leaving.detach(), gradient)
            leaving.backward(gradient)
            assert entering.grad is not None
            store.put(_LOSS, step.batch, entering.grad)


def _not_finite(model: DecoderModel, step: Step, sequence: int, store: StateStore, loss: float) -> UserError:
    row = sequence - step.batch.first
    states = ((index, store.get(index + 1, step.batch)[row]) for index in range(model.num_layers))
    return not_finite(loss, sequence, next((i for i, leaving in states if not leaving.isfinite().all()), None))
