"""Refines a few weights of a shortened model by gradient, so that it predicts more nearly what the whole model predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from sglp_llm.adapters import DecoderAdapter
from sglp_llm.calibration import CalibrationSet
from sglp_llm.engine.branch import refuse_offloaded
from sglp_llm.engine.head import divergence, divergence_gradient, losses
from sglp_llm.engine.modes import evaluating
from sglp_llm.engine.resident import frozen
from sglp_llm.engine.states import StateStore, state_store
from sglp_llm.engine.streamed import Replays, Step, layer_in_memory, layers_in_turn, steps_of
from sglp_llm.engine.walk import Parts
from sglp_llm.loading import DecoderModel
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Advance, Progress, silent

_ENTERING, _DENSE = "entering", "dense"


@dataclass(frozen=True)
class Schedule:
    """How weights are refined: Adam, the rate rising over the first twentieth of the steps and falling by half a cosine.

    Attributes:
        epochs: How often the fit sequences are seen.
        sequences: Of them in one step.
        rate: Learning rate of matrices.
        vector_rate: Learning rate of biases and of the scales of norms.
        seed: Of the order of the steps.
    """

    epochs: int = 3
    sequences: int = 4
    rate: float = 3e-4
    vector_rate: float = 1e-3
    seed: int = 0

    def factor(self, step: int, steps: int) -> float:
        """What the rates are multiplied by at a step, counted from 0."""
        return min(1.0, (step + 1) / max(1.0, 0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Quality:
    """How well the shortened model does on some sequences.

    Attributes:
        divergence: KL(whole model's next-token distribution || the shortened model's), nats a token.
        loss: Mean negative log-likelihood, nats a token.
    """

    divergence: float
    loss: float


@dataclass(frozen=True)
class Refined:
    """What refining has given.

    Attributes:
        values: The best values by the held-out divergence, by name, float32 on the CPU.
        judged_on: What the qualities are of: all held-out sequences, and the first steps of the others, as many.
        before: Quality by part, with the values that it began with.
        after: The same with the best values.
        held_out_divergences: After each epoch.
    """

    values: dict[str, Tensor]
    judged_on: Parts
    before: dict[str, Quality]
    after: dict[str, Quality]
    held_out_divergences: list[float]


def refine(
    model: DecoderModel,
    calibration: CalibrationSet,
    removed: Sequence[int],
    names: Sequence[str],
    start: Mapping[str, Tensor],
    parts: Parts,
    schedule: Schedule,
    *,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> Refined:
    """Minimises the mean divergence of the fit sequences; the model's own weights are not changed.

    What comes before the first of the refined layers is computed once. A model with streamed layers brings every later layer
    twice a step, and holds the activations of one of them at a time.

    Args:
        model: The whole model, resident or streamed.
        calibration: The sequences.
        removed: The layers that go.
        names: Parameters to refine, of layers that stay, by name in the model.
        start: Values of some parameters of layers that stay to begin with, those of ``names`` among them or not.
        parts: The sequences by what they are for.
        schedule: See `Schedule`.
        progress: Told the sequences that are done.
        processes: Each takes its share of every step; all return the same.

    Raises:
        UserError: A layer is offloaded, or the divergence is not finite.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(model.model))
        stack.enter_context(frozen(model.model))
        scratch = None if model.weights is None else model.weights.scratch
        store = stack.enter_context(state_store(model.input_device, scratch))
        judged_on = _judged_on(parts, schedule.sequences)
        # The whole model once, the qualities before and after, and the epochs; the last quality held out is the best epoch's.
        passes = (1 + schedule.epochs) * _count(parts) + _count(judged_on) + len(judged_on.fit)
        advance = stack.enter_context(progress("Refining", passes))
        refining = _Refining(
            model, calibration, removed, names, start, parts, judged_on, schedule, store, advance, processes
        )
        return refining.run()


def refinable_names(layer: nn.Module, adapter: DecoderAdapter, width: int) -> list[str]:
    """Parameters of a decoder layer that make what it adds to the hidden states, or weigh what it sees of them, by name in it.

    The output projections of attention and MLP, and the scales and shifts of norms of the hidden size.
    """
    norms = {
        f"{path}.{name}"
        for path, module in layer.named_modules()
        if not isinstance(module, nn.Linear | Conv1D)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.shape == (width,)
    }
    ends = tuple(f"{end}." for end in (adapter.attention_out, adapter.mlp_out))
    return [name for name, _ in layer.named_parameters() if name in norms or f"{name}.".startswith(ends)]


def _judged_on(parts: Parts, step: int) -> Parts:
    """As many sequences of the fit as are held out, in whole steps."""
    steps = -(-len(parts.held_out) // step)
    return Parts(parts.fit[: steps * step], parts.held_out)


def _count(parts: Parts) -> int:
    return sum(len(part) for _, part in parts.items())


class _Refining:
    def __init__(
        self,
        model: DecoderModel,
        calibration: CalibrationSet,
        removed: Sequence[int],
        names: Sequence[str],
        start: Mapping[str, Tensor],
        parts: Parts,
        judged_on: Parts,
        schedule: Schedule,
        store: StateStore,
        advance: Advance,
        processes: Processes,
    ) -> None:
        self._model, self._schedule, self._judged_on = model, schedule, judged_on
        self._store, self._advance, self._processes = store, advance, processes
        self._replays = Replays(model)
        self._values, self._fixed = self._leaves(names, start)
        first = min(self._layer_of(name) for name in (*self._values, *self._fixed))
        self._kept = [layer for layer in range(first, model.num_layers) if layer not in set(removed)]
        self._steps = {name: self._groups(calibration, part) for name, part in parts.items()}
        self._prepare(first)

    def run(self) -> Refined:
        before = {part: self._quality(part) for part in self._steps}
        best, values = before["held_out"], self._snapshot()
        matrices = [value for value in self._values.values() if value.ndim > 1]
        vectors = [value for value in self._values.values() if value.ndim == 1]
        rates = {"matrices": self._schedule.rate, "vectors": self._schedule.vector_rate}
        groups = [{"params": matrices, "name": "matrices"}, {"params": vectors, "name": "vectors"}]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.95))
        order, history, done = torch.Generator().manual_seed(self._schedule.seed), [], 0
        steps = self._schedule.epochs * len(self._steps["fit"])
        for _ in range(self._schedule.epochs):
            for index in torch.randperm(len(self._steps["fit"]), generator=order).tolist():
                for group in optimizer.param_groups:
                    group["lr"] = rates[group["name"]] * self._schedule.factor(done, steps)
                self._descend(optimizer, self._steps["fit"][index])
                done += 1
            quality = self._quality("held_out")
            history.append(quality.divergence)
            if not math.isfinite(quality.divergence):
                break
            if quality.divergence < best.divergence:
                best, values = quality, self._snapshot()
        for name, value in self._values.items():
            value.data = values[name].to(value.device)
        return Refined(values, self._judged_on, before, {"fit": self._quality("fit"), "held_out": best}, history)

    def _leaves(self, names: Sequence[str], start: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is refined, in float32, and what only stands in for the model's own values."""
        device, values = self._model.input_device, {}
        for index in sorted({self._layer_of(name) for name in names}):
            with layer_in_memory(self._model, index) as layer:
                own = dict(layer.named_parameters())
                for name in names:
                    if self._layer_of(name) == index:
                        value = start.get(name, own[self._local(name)])
                        refuse_offloaded(value)
                        values[name] = value.detach().to(torch.float32, copy=True).requires_grad_(True)
        fixed = {name: value.to(device) for name, value in start.items() if name not in values}
        return values, fixed

    def _groups(self, calibration: CalibrationSet, part: range) -> list[tuple[list[Step], int]]:
        """The sequences of a part in steps: those that are this process's, and how many all processes have."""
        groups = []
        for first in part[:: self._schedule.sequences]:
            whole = range(first, min(first + self._schedule.sequences, part.stop))
            share = self._processes.share(len(whole))
            mine = whole[share.start : share.stop]
            groups.append((steps_of(self._model, calibration, len(whole), mine), len(whole)))
        return groups

    def _prepare(self, first: int) -> None:
        """What enters the first refined layer, and what leaves the last of the whole model."""
        everything = [step for groups in self._steps.values() for steps, _ in groups for step in steps]
        with torch.no_grad():
            for step in everything:
                self._store.put(_DENSE, step.batch, self._replays.first_states(step))
            for index, _ in layers_in_turn(self._model, range(self._model.num_layers)):
                if index == first:
                    self._store.share(_DENSE, _ENTERING)
                for step in everything:
                    states = self._store.get(_DENSE, step.batch)
                    self._store.put(_DENSE, step.batch, self._replays.of(step).layer(index, states))
        self._advance(sum(step.batch.size for step in everything))

    def _descend(self, optimizer: torch.optim.Optimizer, group: tuple[list[Step], int]) -> None:
        steps, sequences = group
        optimizer.zero_grad(set_to_none=True)
        for step in steps:
            final = self._final(step)
            dense = self._store.get(_DENSE, step.batch)
            gradient = divergence_gradient(self._replays.of(step), final.detach(), dense)
            final.backward(gradient / sequences)
            self._advance(step.batch.size)
        for value in self._values.values():
            own = torch.zeros_like(value) if value.grad is None else value.grad
            value.grad = self._processes.sum(own)
        optimizer.step()

    def _quality(self, part: str) -> Quality:
        """Means over the sequences of a part that are judged on."""
        sums, judged_on = torch.zeros(2, dtype=torch.float64), len(dict(self._judged_on.items())[part])
        with torch.no_grad():
            for steps, _ in self._steps[part][: -(-judged_on // self._schedule.sequences)]:
                for step in steps:
                    final, dense = self._final(step), self._store.get(_DENSE, step.batch)
                    replay = self._replays.of(step)
                    sums[0] += float(divergence(replay, final, dense).sum())
                    sums[1] += float(losses(replay, final).sum())
                    self._advance(step.batch.size)
        means = self._processes.sum(sums) / judged_on
        return Quality(*means.tolist())

    def _final(self, step: Step) -> Tensor:
        """What leaves the last layer of the shortened model with the values as they are."""
        states, replay = self._store.get(_ENTERING, step.batch), self._replays.of(step)
        for index in self._kept:

            def through(entering: Tensor, index: int = index) -> Tensor:
                with layer_in_memory(self._model, index) as layer:
                    layer.requires_grad_(False)
                    return replay.layer(index, entering, self._standing_in(index))

            if self._model.weights is not None and torch.is_grad_enabled():
                states = checkpoint(through, states, use_reentrant=False, preserve_rng_state=False)
            else:
                states = through(states)
        return states

    def _standing_in(self, index: int) -> dict[str, Tensor]:
        """Values of a layer's parameters, by their names in it, in the model's dtype."""
        dtype = self._model.model.dtype
        both = (*self._fixed.items(), *self._values.items())
        return {self._local(name): value.to(dtype) for name, value in both if self._layer_of(name) == index}

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().to("cpu", copy=True) for name, value in self._values.items()}

    def _layer_of(self, name: str) -> int:
        return int(name.removeprefix(f"{self._model.adapter.layers}.").partition(".")[0])

    def _local(self, name: str) -> str:
        return name.removeprefix(f"{self._model.adapter.layers}.").partition(".")[2]
