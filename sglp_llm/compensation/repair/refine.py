"""Trains a few weights of a shortened model by gradient descent, so that its predictions match the whole model's more closely."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sglp_llm.adapters import DecoderAdapter
from sglp_llm.calibration import CalibrationSet, Parts
from sglp_llm.compensation.repair.student import Student
from sglp_llm.engine.head import divergence, divergence_gradient, losses
from sglp_llm.engine.resident import frozen
from sglp_llm.engine.states import state_store
from sglp_llm.engine.streamed import Step, steps_of
from sglp_llm.engine.streams import StateStreams
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Advance, Progress, silent

MOVING_SHARE = 0.6
"""Share of a device's free memory that the refined weights may take; the activations of a step need the rest."""

REFINED_BYTES = 16
"""Bytes of a refined weight on a device, beside its copy in the model's dtype: value, gradient, and Adam's two moments."""

_ENTERING, _DENSE = "entering", "dense"


@dataclass(frozen=True)
class Schedule:
    """The training schedule: Adam with linear warm-up over the first 5 % of the steps and cosine decay.

    Attributes:
        epochs: Number of passes over the fit sequences.
        sequences: Sequences per step.
        rate: Peak learning rate of matrices.
        vector_rate: Peak learning rate of biases and of the parameters of norms.
        seed: Random seed for the order of the steps.
    """

    epochs: int = 3
    sequences: int = 4
    rate: float = 3e-4
    vector_rate: float = 1e-3
    seed: int = 0

    def factor(self, step: int, steps: int) -> float:
        """The factor on the learning rates at a step, counted from 0."""
        return min(1.0, (step + 1) / max(1.0, 0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Quality:
    """The quality of the shortened model on some sequences.

    Attributes:
        divergence: KL(whole model's next-token distribution || the shortened model's), nats per token.
        loss: Mean negative log-likelihood, nats per token.
    """

    divergence: float
    loss: float


@dataclass(frozen=True)
class Refined:
    """The result of `refine`.

    Attributes:
        values: The values with the lowest held-out divergence, by name, float32 on the CPU.
        judged_on: The sequences of ``before`` and ``after``: all held-out sequences, and those of as many first fit steps.
        before: Quality by part with the initial values.
        after: Quality by part with ``values``.
        held_out_divergences: The held-out divergence after each epoch.
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
    """Minimises the mean divergence over the fit sequences; the model's own weights are not changed.

    The hidden states that enter the first changed layer are computed once. For a streamed model every kept layer from there on
    is loaded twice per step (forward and backward), and the activations of one layer at a time are in memory.

    Args:
        model: The whole model, resident or streamed.
        calibration: The sequences.
        removed: The removed layers.
        names: Parameters to refine, of kept layers, by name in the model.
        start: Initial values of some parameters of kept layers, whether in ``names`` or not.
        parts: Which sequences are for the fit and which are held out.
        schedule: See `Schedule`.
        progress: Reports finished sequences.
        processes: Each takes its share of every step; all return the same result.

    Raises:
        UserError: A layer is offloaded, or the divergence is not finite.
    """
    groups = {name: _groups(model, calibration, part, schedule.sequences, processes) for name, part in parts.items()}
    # Quality is measured on all held-out steps and on as many fit steps.
    judged = {name: each[: len(groups["held_out"])] for name, each in groups.items()}
    counts = {name: sum(group.sequences for group in each) for name, each in judged.items()}
    # One forward pass of the whole model, quality before and after, and the epochs, each followed by the held-out quality; that
    # of the best epoch is not measured again.
    passes = (
        (1 + schedule.epochs) * sum(len(part) for _, part in parts.items()) + 2 * counts["fit"] + counts["held_out"]
    )
    with (
        evaluating(model.model),
        frozen(model.model),
        state_store(model) as store,
        progress("Refining", passes) as advance,
    ):
        student = Student(model, removed, names, start)
        steps = {name: [step for group in each for step in group.steps] for name, each in groups.items()}
        streams = StateStreams(model, steps, store, lambda _: None)  # it would report layers, not sequences
        _run_once(streams, model.num_layers, removed, student.first)
        advance(sum(step.batch.size for each in steps.values() for step in each))
        refining = _Refining(student, streams, advance, processes)
        before = {part: refining.quality(each) for part, each in judged.items()}
        best, values, history = before["held_out"], student.snapshot(), []
        for _ in refining.epochs(groups["fit"], schedule):
            quality = refining.quality(judged["held_out"])
            history.append(quality.divergence)
            if not math.isfinite(quality.divergence):
                break
            if quality.divergence < best.divergence:
                best, values = quality, student.snapshot()
        student.restore(values)
        after = {"fit": refining.quality(judged["fit"]), "held_out": best}
    return Refined(values, Parts(parts.fit[: counts["fit"]], parts.held_out), before, after, history)


def refinable_names(layer: nn.Module, adapter: DecoderAdapter, width: int) -> list[str]:
    """Names, in a decoder layer, of the parameters that are refined.

    These are the output projections of attention and MLP, and the scales and shifts of norms of the hidden size.
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


@dataclass(frozen=True)
class _Group:
    """The sequences of one training step: this process's share, and the number over all processes."""

    steps: list[Step]
    sequences: int


def _groups(
    model: DecoderModel, calibration: CalibrationSet, part: range, size: int, processes: Processes
) -> list[_Group]:
    groups = []
    for first in part[::size]:
        whole = range(first, min(first + size, part.stop))
        share = processes.share(len(whole))
        mine = whole[share.start : share.stop]
        groups.append(_Group(steps_of(model, calibration, len(whole), mine), len(whole)))
    return groups


def _run_once(streams: StateStreams, num_layers: int, removed: Sequence[int], first: int) -> None:
    """Computes the states leaving the whole model's last layer, and those entering ``first`` in the shortened model."""
    branch_point = min(first, *removed)
    with torch.no_grad():
        streams.begin(_DENSE)
        streams.through(range(branch_point), _DENSE)
        streams.branch(_DENSE, _ENTERING)
        streams.through((layer for layer in range(branch_point, first) if layer not in removed), _ENTERING)
        streams.through(range(branch_point, num_layers), _DENSE)


@dataclass(frozen=True)
class _Refining:
    student: Student
    streams: StateStreams
    advance: Advance
    processes: Processes

    def epochs(self, groups: Sequence[_Group], schedule: Schedule) -> Iterator[None]:
        """Trains the values; yields after every epoch."""
        values = self.student.values.values()
        kinds = (
            (schedule.rate, [value for value in values if value.ndim > 1]),
            (schedule.vector_rate, [value for value in values if value.ndim == 1]),
        )
        optimizer = torch.optim.Adam(
            [{"params": params, "full_rate": rate} for rate, params in kinds if params],
            lr=0.0,
            betas=(0.9, 0.95),
            fused=next(iter(values)).is_cuda or None,  # otherwise its temporaries take the memory of another moment
        )
        order, done = torch.Generator().manual_seed(schedule.seed), 0
        for _ in range(schedule.epochs):
            for index in torch.randperm(len(groups), generator=order).tolist():
                for group in optimizer.param_groups:
                    group["lr"] = group["full_rate"] * schedule.factor(done, schedule.epochs * len(groups))
                self._descend(optimizer, groups[index])
                done += 1
            yield

    def quality(self, groups: Sequence[_Group]) -> Quality:
        """The quality with the current values: means over the sequences of all processes; a collective call."""
        found = [torch.zeros(2, dtype=torch.float64)]
        with torch.no_grad():
            for step in (step for group in groups for step in group.steps):
                final, dense = self._final(step), self.streams.states(_DENSE, step)
                replay = self.streams.replays.of(step)
                found.append(torch.stack([divergence(replay, final, dense).sum(), losses(replay, final).sum()]))
                self.advance(step.batch.size)
        sums = torch.stack([each.to(found[-1].device) for each in found]).sum(dim=0).cpu()  # the one wait
        means = self.processes.sum(sums) / sum(group.sequences for group in groups)
        return Quality(*means.tolist())

    def _descend(self, optimizer: torch.optim.Optimizer, group: _Group) -> None:
        optimizer.zero_grad(set_to_none=True)
        for step in group.steps:
            final = self._final(step)
            dense = self.streams.states(_DENSE, step)
            gradient = divergence_gradient(self.streams.replays.of(step), final.detach(), dense)
            final.backward(gradient / group.sequences)
            self.advance(step.batch.size)
        for value in self.student.values.values():
            own = torch.zeros_like(value) if value.grad is None else value.grad
            value.grad = self.processes.sum(own)
        optimizer.step()

    def _final(self, step: Step) -> Tensor:
        return self.student.final(self.streams.replays.of(step), self.streams.states(_ENTERING, step))
