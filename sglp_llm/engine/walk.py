"""Takes all calibration sequences through a model layer by layer, along more than one way, with either engine."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sglp_llm.calibration import CalibrationSet
from sglp_llm.engine.head import losses
from sglp_llm.engine.modes import evaluating, replaced_weights
from sglp_llm.engine.states import StateStore, state_store
from sglp_llm.engine.streamed import Replays, Step, layers_in_turn, steps_of
from sglp_llm.loading import DecoderModel
from sglp_llm.processes import Processes
from sglp_llm.progress import Advance

Visit = Callable[[Step, torch.Tensor], None]
"""Told some sequences and what leaves a layer, ``[batch, tokens, hidden]``."""


@dataclass(frozen=True)
class Parts:
    """Calibration sequences, by what they are for: numbers of sequences, half open and disjoint."""

    fit: range
    held_out: range

    def items(self) -> list[tuple[str, range]]:
        """Name and range of each."""
        return list(vars(self).items())


def split(samples: int, held_out: float) -> Parts:
    """The last share of the sequences is held out, at least one; at least one is not.

    Args:
        samples: Number of sequences, at least 2.
        held_out: The share, in (0, 1).
    """
    assert samples > 1
    first = min(max(samples - max(int(held_out * samples + 0.5), 1), 1), samples - 1)
    return Parts(range(first), range(first, samples))


class Walk:
    """The ways that are under way, each a slot: what enters the next layer on that way, of this process's sequences.

    Args:
        model: Resident or streamed.
        steps: The sequences by part.
        store: Where the states wait.
        advance: Told every layer that all sequences have gone through.

    Attributes:
        replays: For running layers and the head on a step.
    """

    def __init__(
        self, model: DecoderModel, steps: Mapping[str, Sequence[Step]], store: StateStore, advance: Advance
    ) -> None:
        self.advance = advance
        self._model, self._steps, self._store = model, steps, store
        self.replays = Replays(model)

    def begin(self, slot: Hashable) -> None:
        """A way begins in front of layer 0."""
        for step in self._all():
            self._store.put(slot, step.batch, self.replays.first_states(step))
        if self._model.weights is not None:
            self._model.weights.rest()

    def fork(self, slot: Hashable, other: Hashable) -> None:
        """Another way, or a new one under an old name, goes on from where this one is."""
        self._store.drop(other)
        self._store.share(slot, other)

    def end(self, *slots: Hashable) -> None:
        """Forgets ways."""
        for slot in slots:
            self._store.drop(slot)

    def states(self, slot: Hashable, step: Step) -> torch.Tensor:
        """Where these sequences are on a way, ``[batch, tokens, hidden]``."""
        return self._store.get(slot, step.batch)

    def through(self, order: Iterable[int], *slots: Hashable) -> None:
        """Takes some ways through the layers in this order; each layer is brought once for all of them."""
        for index, _ in layers_in_turn(self._model, order):
            for step in self._all():
                replay = self.replays.of(step)
                for slot in slots:
                    self._store.put(slot, step.batch, replay.layer(index, self._store.get(slot, step.batch)))
            self.advance(1)

    def through_replaced(self, index: int, tensors: Mapping[str, torch.Tensor], slot: Hashable) -> None:
        """Takes a way through one layer that has other values of some parameters, by their names in the model."""
        with replaced_weights(self._model, tensors):
            self.through([index], slot)

    def show(self, index: int, slot: Hashable, visits: Mapping[str, Visit]) -> None:
        """Takes a way through one layer that is in memory, and shows what leaves it to the visit of each part."""
        for part, visit in visits.items():
            for step in self._steps[part]:
                leaving = self.replays.of(step).layer(index, self._store.get(slot, step.batch))
                visit(step, leaving)
                self._store.put(slot, step.batch, leaving)
        self.advance(1)

    def losses(self, slot: Hashable) -> dict[str, float]:
        """Sums of the losses of the parts' sequences, in nats a token, of a way that has left the last layer."""
        return {
            part: sum(float(losses(self.replays.of(step), self.states(slot, step)).sum()) for step in steps)
            for part, steps in self._steps.items()
        }

    def _all(self) -> list[Step]:
        return [step for steps in self._steps.values() for step in steps]


@contextmanager
def walking(
    model: DecoderModel,
    calibration: CalibrationSet,
    parts: Parts,
    batch_size: int,
    processes: Processes,
    advance: Advance,
) -> Iterator[Walk]:
    """A walk over this process's share of each part, in evaluation mode and without gradients."""
    steps = {}
    for name, part in parts.items():
        share = processes.share(len(part))
        steps[name] = steps_of(model, calibration, batch_size, part[share.start : share.stop])
    scratch = None if model.weights is None else model.weights.scratch
    with evaluating(model.model), torch.no_grad(), state_store(model.input_device, scratch) as store:
        yield Walk(model, steps, store, advance)
