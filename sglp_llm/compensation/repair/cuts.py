"""Compensates for each cut (run of removed layers), front to back, with a map that is fitted and folded into existing weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sglp_llm.adapters import Branch
from sglp_llm.calibration import CalibrationSet, Parts, split
from sglp_llm.compensation.repair.settings import DEFAULTS, FitSettings
from sglp_llm.engine.streamed import Step, layer_in_memory
from sglp_llm.engine.streams import StateStreams, Visit, state_streams
from sglp_llm.errors import UserError
from sglp_llm.method.proposals import runs_of
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import products_in_bfloat16
from sglp_llm.processes import Processes
from sglp_llm.records import Segment

Target = Literal["dense", "local"]
"""The target hidden states after a cut: ``dense``, the whole model's; or ``local``, those that the removed layers would compute
from the shortened model's hidden states. The two are the same for the first cut."""

Losses = dict[str, float]
"""Mean loss of the sequences by part, in nats per token."""

_STUDENT, _DENSE, _PLAIN, _REPAIRED, _WITHOUT, _WITH = "student", "dense", "plain", "repaired", "without", "with"


class CutFit(ABC):
    """The fit at one cut ``[i, j)``: it sees all tokens once, then returns new values for the layer before the cut."""

    @abstractmethod
    def watching(self, layer: nn.Module, branch: Branch) -> AbstractContextManager[list[torch.Tensor]]:
        """Inside the block the list holds, after each call of the layer, what `on_rows` gets as ``part``."""

    @abstractmethod
    def on_rows(self, name: str, part: torch.Tensor, leaving: torch.Tensor, target: torch.Tensor) -> None:
        """Called with the tokens of a batch, without padding: each ``[rows, width]``, on one device.

        Args:
            name: ``fit`` or ``held_out``.
            part: What `watching` has kept.
            leaving: The hidden states that leave layer i-1.
            target: The target hidden states.
        """

    @abstractmethod
    def new_values(self, layer: nn.Module, branch: Branch, processes: Processes) -> Mapping[str, torch.Tensor] | None:
        """New values by the parameter's name in the layer, float64; ``None`` if no change was found that helps.

        A collective call with the same result in each process.
        """

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """The result of the fit, as plain data."""


NewFit = Callable[[int, torch.device], CutFit]
"""Creates a fit, given the width of the hidden states and the device for its sums."""


@dataclass(frozen=True)
class Repair:
    """The result of `repair_cuts`.

    Attributes:
        tensors: New values by the parameter's name in the model, in the dtype in which they will be stored.
        cuts: A report for each cut, front to back, as plain data.
        losses: Losses of the shortened model by part, without and with the new values; empty if the only cut is at the front.
    """

    tensors: dict[str, torch.Tensor]
    cuts: list[dict[str, Any]]
    losses: dict[str, dict[str, float | None]]


def cuts_of(removed: Iterable[int]) -> list[Segment]:
    """The maximal runs of removed layers, front to back."""
    return [Segment(*run) for run in runs_of(set(removed))]


def repair_cuts(
    model: DecoderModel,
    calibration: CalibrationSet,
    removed: Sequence[int],
    new_fit: NewFit,
    settings: FitSettings = DEFAULTS,
    target: Target = "dense",
) -> Repair:
    """Repairs every cut that has a layer before it; the fit's inputs come from the shortened model as repaired so far.

    A fit is used only if it lowers the mean loss of the shortened model on the held-out sequences and does not raise it on the
    fit sequences.

    Args:
        model: The whole model, resident or streamed; its weights are unchanged afterwards.
        calibration: At least 2 sequences.
        removed: The removed layers.
        new_fit: Creates the fit for one cut.
        settings: See `FitSettings`; the progress reports layers that all sequences have passed.
        target: See `Target`.

    Raises:
        UserError: Hidden states or losses are not finite, or a layer that would be changed is offloaded.
    """
    cuts, parts = cuts_of(removed), split(len(calibration.input_ids), settings.held_out)
    if not any(cut.start for cut in cuts):
        return Repair({}, [_front(cut) for cut in cuts], {})
    kept = [layer for layer in range(model.num_layers) if layer not in set(removed)]
    with (
        settings.progress("Compensating", _work(cuts, kept)) as advance,
        state_streams(model, calibration, parts, settings.batch_size, settings.processes, advance) as streams,
    ):
        repairing = _Repairing(model, streams, parts, kept, target, settings)
        for cut in cuts:
            if cut.start == 0:
                repairing.pass_front(cut)
            else:
                repairing.repair(cut, new_fit(model.config.hidden_size, model.input_device))
    return repairing.result()


class _Repairing:
    """The state of the repair: the cuts before layer ``_here`` are done, and `_STUDENT` holds the states entering it."""

    def __init__(
        self,
        model: DecoderModel,
        streams: StateStreams,
        parts: Parts,
        kept: Sequence[int],
        target: Target,
        settings: FitSettings,
    ) -> None:
        self._model, self._streams, self._parts, self._kept = model, streams, parts, kept
        self._target, self._stored, self._processes = target, settings.stored, settings.processes
        self._bfloat16 = settings.bfloat16
        self._branch = model.adapter.mlp_branch(model.config)
        self._here = 0
        self._apart = False  # whether `_DENSE` is kept between cuts as a separate stream
        self._tensors: dict[str, torch.Tensor] = {}
        self._reports: list[dict[str, Any]] = []
        self._first: Losses | None = None  # of the shortened model without new values
        self._current: Losses | None = None  # with the new values so far
        streams.begin(_STUDENT)

    def result(self) -> Repair:
        assert self._first is not None
        assert self._current is not None
        return Repair(self._tensors, self._reports, _by_part(self._first, self._current))

    def pass_front(self, cut: Segment) -> None:
        """Skips a cut that has no layer before it."""
        self._dense_through(0, cut)
        self._reports.append(_front(cut))

    def repair(self, cut: Segment, fit: CutFit) -> None:
        """Fits, decides by the losses, and moves the student's stream past the cut."""
        streams, layer = self._streams, cut.start - 1
        streams.through(range(self._here, layer), _STUDENT, *([_DENSE] if self._apart else []))
        self._dense_through(layer, cut)
        tensors = self._fitted(layer, fit)
        trials = {_WITHOUT: _PLAIN} if self._current is None else {}
        if tensors:
            streams.branch(_STUDENT, _REPAIRED)
            streams.through_replaced(layer, tensors, _REPAIRED)
            trials[_WITH] = _REPAIRED
        else:
            streams.advance(1)
        streams.end(_STUDENT)
        losses = self._losses(cut, trials)
        without = losses[_WITHOUT] if self._current is None else self._current
        with_it = losses.get(_WITH, without)
        reason = _reason_against(without, with_it) if tensors else "no ridge lowers the error on the held-out sequences"
        streams.branch(_PLAIN if reason else _REPAIRED, _STUDENT)
        streams.end(_PLAIN, _REPAIRED)
        if not reason:
            self._tensors.update(tensors)
        self._first = self._first or without
        self._current = without if reason else with_it
        self._reports.append(
            {
                "start": cut.start,
                "stop": cut.stop,
                "layer": layer,
                **fit.report(),
                "losses": _by_part(without, with_it),
                "taken": not reason,
                **({"reason": reason} if reason else {}),
            }
        )

    def _dense_through(self, layer: int, cut: Segment) -> None:
        """Runs the target's stream from the input of ``layer`` through the layers of the cut."""
        if not self._apart:
            self._streams.branch(_STUDENT, _DENSE)
        self._streams.through(range(layer, cut.stop), _DENSE)
        self._here, self._apart = cut.stop, self._target == "dense"

    def _fitted(self, layer: int, fit: CutFit) -> dict[str, torch.Tensor]:
        """New values of parameters by name, rounded to the stored dtype; `_PLAIN` becomes the student's stream without them."""
        streams, branch = self._streams, self._branch
        streams.branch(_STUDENT, _PLAIN)
        with layer_in_memory(self._model, layer) as module, fit.watching(module, branch) as seen:

            def visit(part: str) -> Visit:
                def show(step: Step, leaving: torch.Tensor) -> None:
                    target = streams.states(_DENSE, step)
                    mask = step.batch.mask  # on the host, where counting the rows waits for nothing
                    rows: Any = slice(None)
                    if mask is not None:
                        rows = mask.flatten().nonzero().flatten().to(target.device, non_blocking=True)
                    given = seen[0].reshape(*leaving.shape[:2], -1)
                    fit.on_rows(
                        part, *(each.to(target.device).flatten(0, 1)[rows] for each in (given, leaving, target))
                    )

                return show

            streams.show(layer, _PLAIN, {part: visit(part) for part, _ in self._parts.items()})
            values = fit.new_values(module, branch, self._processes)
            if values is None:
                return {}
            prefix = f"{self._model.adapter.layers}.{layer}."
            dtype_of = self._stored or (lambda _: self._model.model.dtype)
            return {prefix + name: value.to(dtype_of(prefix + name)).cpu() for name, value in values.items()}

    def _losses(self, cut: Segment, trials: Mapping[str, str]) -> dict[str, Losses]:
        """Losses of the shortened model by trial; ``trials`` maps each to its stream after the cut. Later layers are as is."""
        for trial, slot in trials.items():
            self._streams.branch(slot, trial)
        rest = [layer for layer in self._kept if layer >= cut.stop]
        with products_in_bfloat16(self._model.input_device, self._bfloat16):
            if trials:
                self._streams.through(rest, *trials)
            else:
                self._streams.advance(len(rest))
            sums_of = {trial: self._streams.losses(trial) for trial in trials}
        found = {}
        for trial, sums in sums_of.items():
            self._streams.end(trial)
            total = self._processes.sum(
                torch.tensor([sums[part] for part, _ in self._parts.items()], dtype=torch.float64)
            )
            found[trial] = {
                name: float(loss) / len(part) for (name, part), loss in zip(self._parts.items(), total, strict=True)
            }
        if not all(map(math.isfinite, found.get(_WITHOUT, {}).values())):
            raise UserError(
                f"the loss of the shortened model is not finite ({found[_WITHOUT]}): the weights are damaged, or the dtype is "
                "too small (try --dtype float32)"
            )
        return found


def _work(cuts: Sequence[Segment], kept: Sequence[int]) -> int:
    """The number of layer passes over all sequences, for the progress bar."""
    here = work = 0
    for cut in cuts:
        layer = max(cut.start - 1, 0)
        work += layer - here + cut.stop - layer
        if cut.start:
            work += 2 + sum(index >= cut.stop for index in kept)
        here = cut.stop
    return work


def _front(cut: Segment) -> dict[str, Any]:
    reason = "no layer stands before it that could make up for it"
    return {"start": cut.start, "stop": cut.stop, "taken": False, "reason": reason}


def _reason_against(without: Losses, with_it: Losses) -> str | None:
    """Why new values are not used, or ``None`` if they are; NaN counts as worse than any loss."""
    if not with_it["held_out"] < without["held_out"]:
        return "it does not lower the loss on the held-out sequences"
    if not with_it["fit"] <= without["fit"]:
        return "it raises the loss on the sequences that it was fitted on"
    return None


def _by_part(without: Losses, with_it: Losses) -> dict[str, dict[str, float | None]]:
    """The losses for the report; values that are not finite, which JSON lacks, become ``None``."""
    return {
        part: {
            name: loss[part] if math.isfinite(loss[part]) else None
            for name, loss in ((_WITHOUT, without), (_WITH, with_it))
        }
        for part in without
    }
