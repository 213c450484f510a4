"""Measurements of many shortened models in memory, kept piece by piece in a journal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglp_llm.calibration import EvaluationWindows
from sglp_llm.checkpoint.export import shortened
from sglp_llm.comparison.window_losses import window_losses_without
from sglp_llm.evaluation.perplexity import window_losses
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import load_plan
from sglp_llm.progress import Progress
from sglp_llm.trials import Journal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_WINDOWS_A_PIECE = 16


@dataclass(frozen=True)
class Measured:
    """The result of one measurement on one model.

    Attributes:
        numbers: By name.
        losses: Mean negative log-likelihood of every window in nats per token, where the measurement is a perplexity: windows
            are the same for all models, so that differences are paired.
    """

    numbers: dict[str, float]
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """Something that is measured on every shortened model.

    Attributes:
        name: For tables.
    """

    name: str


@dataclass(frozen=True)
class Scored(Measurement):
    """A measurement by a function of the live model.

    Attributes:
        key: Everything that its numbers depend on beside the model; the key in the journal.
        measure: The function.
    """

    key: str
    measure: Callable[[PreTrainedModel], Measured]


@dataclass(frozen=True)
class Losses(Measurement):
    """A measurement from the losses of windows of text.

    Attributes:
        windows: ``[windows, window]``.
        summarise: Turns the windows' losses into numbers; the one called ``perplexity`` is plotted.
    """

    windows: torch.Tensor
    summarise: Callable[[Sequence[float]], Measured]


@dataclass(frozen=True)
class Measuring:
    """How the models of a comparison are measured.

    Attributes:
        measurements: What is measured.
        kept: Folder of the journal of the numbers, which all comparisons of a model can share, whatever their calibration.
        dtype: What is computed in; ``None`` = what the criteria are computed in.
    """

    measurements: Sequence[Measurement]
    kept: Path
    dtype: str | None = None


@dataclass(frozen=True)
class Shortened:
    """A model with layers removed; equal ones compute the same.

    Attributes:
        removed: Original indices of the removed layers, ascending; empty for the whole model.
        tensors: Digest of the replaced tensors; empty when there are none.
        folder: Folder of the plan with those tensors, or of the trained checkpoint.
        is_trained: Whether it is a checkpoint that was trained after the removal; ``tensors`` is the digest of its files then.
    """

    removed: tuple[int, ...]
    tensors: str = ""
    folder: Path | None = field(default=None, compare=False)
    is_trained: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"without {list(self.removed)}" + (f" with {self.tensors}" if self.tensors else "")

    @contextmanager
    def of(self, opened: OpenedModel) -> Iterator[PreTrainedModel]:
        """The opened model, shortened inside the block; or the trained one."""
        if self.is_trained:
            assert self.folder is not None
            yield opened.alike(self.folder).load().model
            return
        replaced = {}
        if self.tensors:
            assert self.folder is not None
            replaced = dict(load_plan(self.folder).replaced)
        with shortened(opened.load().model, self.removed, replaced) as model:
            yield model


def measured(
    opened: OpenedModel,
    models: Sequence[Shortened],
    measurements: Sequence[Measurement],
    journal: Journal,
    progress: Progress,
) -> dict[Shortened, dict[str, Measured]]:
    """The results of all measurements on each different model, by measurement."""
    different = list(dict.fromkeys(models))
    results: dict[Shortened, dict[str, Measured]] = {each: {} for each in different}
    for measurement in measurements:
        if isinstance(measurement, Losses):
            found = _window_losses(opened, different, measurement.windows, journal, progress)
            for each, losses in found.items():
                results[each][measurement.name] = measurement.summarise(losses)
            continue
        assert isinstance(measurement, Scored)
        with progress("Measuring", len(different)) as advance:
            for each in different:

                def one(each: Shortened = each, measurement: Scored = measurement) -> dict[str, Any]:
                    with each.of(opened) as model:
                        return asdict(measurement.measure(model))

                kept = journal.once(f"{measurement.key} {each}", one)
                results[each][measurement.name] = Measured(kept["numbers"], tuple(kept["losses"]))
                advance(1)
    return results


def _window_losses(
    opened: OpenedModel,
    models: Sequence[Shortened],
    windows: torch.Tensor,
    journal: Journal,
    progress: Progress,
) -> dict[Shortened, list[float]]:
    """The loss of every window for every model, some windows at a time; models without replaced tensors share computation."""
    parts = dict(zip(range(0, len(windows), _WINDOWS_A_PIECE), windows.split(_WINDOWS_A_PIECE), strict=True))
    # Keyed by content: a later run with more windows of the same text computes only the new ones.
    keys = {first: hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest() for first, part in parts.items()}

    def piece(model: Shortened, first: int) -> str:
        return f"losses of {keys[first]} {model}"

    plain = [each for each in models if not each.tensors]
    repaired = [each for each in models if each.tensors]
    with progress("Measuring", len(windows) * (bool(plain) + len(repaired))) as advance:
        for first, part in parts.items() if plain else ():
            if missing := [frozenset(each.removed) for each in plain if journal.get(piece(each, first)) is None]:
                for removed, values in window_losses_without(opened.load(), part, missing).items():
                    journal.once(piece(Shortened(tuple(sorted(removed))), first), partial(list, values))
            advance(len(part))
        for each in repaired:
            missing_parts = {first: part for first, part in parts.items() if journal.get(piece(each, first)) is None}
            advance(len(windows) - sum(map(len, missing_parts.values())))
            if not missing_parts:
                continue
            with each.of(opened) as model:
                for first, part in missing_parts.items():
                    losses = window_losses(model, EvaluationWindows(part, "", bos=False))
                    journal.once(piece(each, first), losses.tolist)
                    advance(len(part))
    return {each: [loss for first in parts for loss in journal.get(piece(each, first))] for each in models}
