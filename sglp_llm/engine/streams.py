"""Runs all calibration sequences through a resident or streamed model layer by layer, as several streams of hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from sglp_llm.calibration import CalibrationSet, Parts
from sglp_llm.engine.head import losses
from sglp_llm.engine.modes import replaced_weights
from sglp_llm.engine.states import StateStore, state_store
from sglp_llm.engine.streamed import Replays, Step, layers_in_turn, steps_of
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating
from sglp_llm.processes import Processes
from sglp_llm.progress import Advance

Visit = Callable[[Step, torch.Tensor], None]
"""Called with a batch of sequences and the hidden states that leave a layer, ``[batch, tokens, hidden]``."""


class StateStreams:
    """Named streams of hidden states: each holds the states that enter the next layer, for all sequences of this process.

    A stream can be branched into others, e.g. for the whole model, the shortened model, and the shortened model with other
    weights.

    Args:
        model: Resident or streamed.
        steps: The sequences by part.
        store: Storage for the states between layers.
        advance: Progress callback, called with 1 after each layer.

    Attributes:
        replays: For running layers and the head on a step.
    """

    def __init__(
        self, model: DecoderModel, steps: Mapping[str, Sequence[Step]], store: StateStore, advance: Advance
    ) -> None:
        self.advance = advance
        self._model, self._steps, self._store = model, steps, store
        self.replays = Replays(model)

    def begin(self, stream: str) -> None:
        """Begins a stream at the input of layer 0."""
        for step in self._all():
            self._store.put(stream, step.batch, self.replays.first_states(step))
        if self._model.weights is not None:
            self._model.weights.rest()

    def branch(self, stream: str, other: str) -> None:
        """Begins the stream ``other`` with the current states of ``stream``; replaces an earlier stream of that name."""
        self._store.drop(other)
        self._store.share(stream, other)

    def end(self, *streams: str) -> None:
        """Deletes streams."""
        for stream in streams:
            self._store.drop(stream)

    def states(self, stream: str, step: Step) -> torch.Tensor:
        """The hidden states of these sequences in a stream, ``[batch, tokens, hidden]``."""
        return self._store.get(stream, step.batch)

    def through(self, order: Iterable[int], *streams: str) -> None:
        """Runs some streams through the layers in this order; each layer is loaded once for all of them."""
        for index, _ in layers_in_turn(self._model, order):
            for step in self._all():
                replay = self.replays.of(step)
                for stream in streams:
                    self._store.put(stream, step.batch, replay.layer(index, self._store.get(stream, step.batch)))
            self.advance(1)

    def through_replaced(self, index: int, tensors: Mapping[str, torch.Tensor], stream: str) -> None:
        """Runs a stream through one layer with other values of some parameters, by name in the model."""
        with replaced_weights(self._model, tensors):
            self.through([index], stream)

    def show(self, index: int, stream: str, visits: Mapping[str, Visit]) -> None:
        """Runs a stream through one layer that is in memory; calls each part's ``Visit`` with the leaving states."""
        for part, visit in visits.items():
            for step in self._steps[part]:
                leaving = self.replays.of(step).layer(index, self._store.get(stream, step.batch))
                visit(step, leaving)
                self._store.put(stream, step.batch, leaving)
        self.advance(1)

    def losses(self, stream: str) -> dict[str, float]:
        """The sum of the sequences' losses by part, in nats per token, for a stream that has left the last layer."""
        found = {}
        for part, steps in self._steps.items():
            each = [losses(self.replays.of(step), self.states(stream, step)).sum() for step in steps]
            found[part] = float(torch.stack(each).sum()) if each else 0.0  # the one wait for the device
        return found

    def _all(self) -> list[Step]:
        return [step for steps in self._steps.values() for step in steps]


@contextmanager
def state_streams(
    model: DecoderModel,
    calibration: CalibrationSet,
    parts: Parts,
    batch_size: int,
    processes: Processes,
    advance: Advance,
) -> Iterator[StateStreams]:
    """Streams for this process's share of each part, in evaluation mode and without gradients."""
    steps = {}
    for name, part in parts.items():
        share = processes.share(len(part))
        steps[name] = steps_of(model, calibration, batch_size, part[share.start : share.stop])
    with evaluating(model.model), torch.no_grad(), state_store(model) as store:
        yield StateStreams(model, steps, store, advance)
