"""Losses of many shortened models on the same windows; shared prefixes of layers are computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

from sglp_llm.calibration import CalibrationSet
from sglp_llm.engine import Batch
from sglp_llm.engine.loss import token_nll
from sglp_llm.engine.replay import Replay
from sglp_llm.models.loading import DecoderModel
from sglp_llm.processes import Processes
from sglp_llm.progress import Progress, silent
from sglp_llm.trials import Removed, TrialObserver, Trials


class _WindowLosses(TrialObserver):
    def __init__(self) -> None:
        self.losses: dict[Removed, list[float]] = defaultdict(list)

    def on_trial(self, removed: Removed, batch: Batch, replay: Replay, final: torch.Tensor) -> None:
        self.losses[removed] += token_nll(replay.logits(final), replay.ids).cpu().double().mean(dim=1).tolist()

    def on_end(self, sets: Sequence[Removed], processes: Processes) -> None:
        assert processes.count == 1


def window_losses_without(
    model: DecoderModel, input_ids: torch.Tensor, sets: Iterable[Removed], progress: Progress = silent
) -> dict[Removed, list[float]]:
    """The result of `sglp_llm.evaluation.perplexity.window_losses` for the model without each set of layers.

    Args:
        model: The whole model.
        input_ids: ``[windows, window]``, without padding.
        sets: Sets of layers to remove; the empty set is the whole model.
        progress: Reports finished windows, of all models.
    """
    windows = CalibrationSet(input_ids, torch.ones_like(input_ids, dtype=torch.bool), "", 0, "", False)
    observer = _WindowLosses()
    Trials(model, windows, progress=progress).run(sets, observer, "Scoring")
    return dict(observer.losses)
