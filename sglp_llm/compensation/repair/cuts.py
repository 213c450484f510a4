"""Repairs cuts in existing weights, front to back: the engine shows what enters and leaves them, a fit says what to fold in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sglp_llm.calibration import CalibrationSet, Parts, split
from sglp_llm.compensation.repair.branch import branch_outputs, folded
from sglp_llm.compensation.repair.settings import DEFAULTS, FitSettings
from sglp_llm.engine.streamed import Step, layer_in_memory
from sglp_llm.engine.streams import StateStreams, Visit, state_streams
from sglp_llm.errors import UserError
from sglp_llm.method.proposals import runs_of
from sglp_llm.models.loading import DecoderModel
from sglp_llm.processes import Processes
from sglp_llm.records import Segment

Target = Literal["dense", "local"]
"""Where the states behind a cut should be: where the whole model has them, or where the layers that were cut would take those
that now enter them. The two are the same for the first cut."""

Losses = dict[str, float]
"""Mean loss of the sequences of each part, in nats a token."""

_STUDENT, _DENSE, _PLAIN, _REPAIRED, _WITHOUT, _WITH = "student", "dense", "plain", "repaired", "without", "with"


class CutFit(ABC):
    """What is fitted at one cut ``[i, j)``: it sees all tokens once, then says what the branch is multiplied by."""

    @abstractmethod
    def on_rows(self, part: str, branch: torch.Tensor, leaving: torch.Tensor, target: torch.Tensor) -> None:
        """Some tokens, padding left out: each ``[rows, hidden]``, on one device.

        Args:
            part: ``fit`` or ``held_out``.
            branch: What the branch gives.
            leaving: What leaves layer i-1, of which the branch is a part.
            target: Where that should be.
        """

    @abstractmethod
    def factor(self, processes: Processes) -> torch.Tensor | None:
        """``[hidden, hidden]``, or ``[hidden]`` factors of channels; ``None`` where nothing is better than no change.

        A collective call, the same result in each process.
        """

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """What was found, as plain data."""


NewFit = Callable[[int, torch.device], CutFit]
"""Makes a fit, given the width of the hidden states and the device on which it is shown them."""


@dataclass(frozen=True)
class Repair:
    """What repairing the cuts has given.

    Attributes:
        tensors: New values by the parameter's name in the model, in the dtype in which they will be stored.
        cuts: A report for each cut, front to back, as plain data.
        losses: Of the shortened model by part, without and with all that was taken; empty when no cut could be repaired.
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
    """Repairs every cut that has a layer before it, each with the repaired model in front of it as input.

    The guard: what a fit has found is taken only where the mean loss of the shortened model falls on the held-out sequences,
    and does not rise on those of the fit.

    Args:
        model: The whole model, resident or streamed; its weights are its own again afterwards.
        calibration: At least 2 sequences.
        removed: The layers that go.
        new_fit: Makes what is fitted at one cut.
        settings: See `FitSettings`; the progress is told the layers that all sequences have gone through.
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
                repairing.repair(cut, new_fit(model.model.config.hidden_size, model.input_device))
    return repairing.result()


class _Repairing:
    """Where the repair is: the cuts up to ``here`` are done, and the student stands behind them."""

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
        self._branch = model.adapter.mlp_branch(model.model.config)
        self._here = 0
        self._apart = False  # whether the whole model has a stream of its own
        self._tensors: dict[str, torch.Tensor] = {}
        self._reports: list[dict[str, Any]] = []
        self._first: Losses | None = None  # of the shortened model as it is
        self._current: Losses | None = None  # with what has been taken so far
        streams.begin(_STUDENT)

    def result(self) -> Repair:
        assert self._first is not None
        assert self._current is not None
        return Repair(self._tensors, self._reports, _by_part(self._first, self._current))

    def pass_front(self, cut: Segment) -> None:
        """Passes a cut that has no layer before it."""
        self._dense_through(0, cut)
        self._reports.append(_front(cut))

    def repair(self, cut: Segment, fit: CutFit) -> None:
        """Fits, judges, and takes the student behind the cut."""
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
        """Takes what the target is from the entry of ``layer`` through the layers of the cut."""
        if not self._apart:
            self._streams.branch(_STUDENT, _DENSE)
        self._streams.through(range(layer, cut.stop), _DENSE)
        self._here, self._apart = cut.stop, self._target == "dense"

    def _fitted(self, layer: int, fit: CutFit) -> dict[str, torch.Tensor]:
        """New values of parameters by name, as they will be stored; the student without them is the stream `_PLAIN`."""
        streams, branch = self._streams, self._branch
        streams.branch(_STUDENT, _PLAIN)
        with layer_in_memory(self._model, layer) as module, branch_outputs(module, branch) as outputs:

            def visit(part: str) -> Visit:
                def show(step: Step, leaving: torch.Tensor) -> None:
                    target = streams.states(_DENSE, step)
                    rows = slice(None) if step.mask is None else step.mask.flatten().to(target.device)
                    given = outputs[0].reshape(leaving.shape)
                    fit.on_rows(
                        part, *(each.to(target.device).flatten(0, 1)[rows] for each in (given, leaving, target))
                    )

                return show

            streams.show(layer, _PLAIN, {part: visit(part) for part, _ in self._parts.items()})
            factor = fit.factor(self._processes)
            if factor is None:
                return {}
            values = folded(module, branch, factor)
            prefix = f"{self._model.adapter.layers}.{layer}."
            dtype_of = self._stored or (lambda _: self._model.model.dtype)
            return {prefix + name: value.to(dtype_of(prefix + name)).cpu() for name, value in values.items()}

    def _losses(self, cut: Segment, trials: Mapping[str, str]) -> dict[str, Losses]:
        """Losses of the shortened model by trial, each from a stream behind the cut; the layers after it are unchanged."""
        for trial, slot in trials.items():
            self._streams.branch(slot, trial)
        rest = [layer for layer in self._kept if layer >= cut.stop]
        if trials:
            self._streams.through(rest, *trials)
        else:
            self._streams.advance(len(rest))
        found = {}
        for trial in trials:
            sums = self._streams.losses(trial)
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
    """Layers that all sequences go through, for the progress bar."""
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
    """Why new values are not taken; a loss that is not a number is above any other."""
    if not with_it["held_out"] < without["held_out"]:
        return "it does not lower the loss on the held-out sequences"
    if not with_it["fit"] <= without["fit"]:
        return "it raises the loss on the sequences that it was fitted on"
    return None


def _by_part(without: Losses, with_it: Losses) -> dict[str, dict[str, float | None]]:
    """For the report, where a number that JSON does not have is ``None``."""
    return {
        part: {
            name: loss[part] if math.isfinite(loss[part]) else None
            for name, loss in ((_WITHOUT, without), (_WITH, with_it))
        }
        for part in without
    }
