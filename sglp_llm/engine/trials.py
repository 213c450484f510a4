"""Trials: what would the model compute without this layer, for every layer, at the cost of the suffixes only.

Removing layer l leaves the hidden states that enter it unchanged, so the layers in front of it run once for all trials. The head
and the loss run once a trial; over all L layers that is L(L-1)/2 + L layer passes and L heads instead of L(L-1) and L.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglp_llm.calibration import CalibrationSet
from sglp_llm.engine.modes import evaluating
from sglp_llm.engine.replay import Replay
from sglp_llm.engine.resident import batches
from sglp_llm.engine.streamed import steps_of
from sglp_llm.engine.streamed_trials import run_streamed_trials
from sglp_llm.engine.trial_observer import TrialObserver
from sglp_llm.loading import DecoderModel
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent


class Trials:
    """Removes one more layer, tentatively, wherever it is asked to.

    Args:
        model: The model.
        calibration: The sequences.
        batch_size: Sequences computed at once.
        progress: Told the trials that are done, in sequences.
        processes: Each takes its share of the sequences; all must run the same trials.
    """

    def __init__(
        self,
        model: DecoderModel,
        calibration: CalibrationSet,
        batch_size: int = 1,
        progress: Progress = silent,
        processes: Processes = ALONE,
    ) -> None:
        self.model = model
        self._calibration = calibration
        self._batch_size = batch_size
        self._progress = progress
        self._processes = processes

    def run(
        self, removed: Sequence[int], candidates: Sequence[int], observer: TrialObserver, description: str = "Trials"
    ) -> None:
        """Shows the observer every candidate's removal on top of those that are removed already.

        Args:
            removed: Layers that are gone in this round.
            candidates: Layers to try, none of them removed.
            observer: Told what comes out.
            description: For the progress bar.
        """
        gone, order = frozenset(removed), sorted(candidates)
        share = self._processes.share(len(self._calibration.input_ids), observer.together)
        if self.model.weights is None:
            self._run_resident(gone, order, observer, share, description)
        else:
            steps = steps_of(self.model, self._calibration, self._batch_size, share)
            run_streamed_trials(self.model, steps, gone, order, observer, self._progress, description)
        observer.on_end(order, self._processes)

    def _run_resident(
        self, gone: frozenset[int], order: Sequence[int], observer: TrialObserver, share: range, description: str
    ) -> None:
        # Up to the first removed layer the whole model computes what the current one does.
        branch = {min(gone)} if gone and observer.needs_dense else set()
        wanted = sorted({*order, *branch})
        with (
            torch.inference_mode(),
            evaluating(self.model.model),
            self._progress(description, len(order) * len(share)) as advance,
        ):
            for batch, ids, mask in batches(self._calibration, self._batch_size, self.model.input_device, share):
                replay = Replay(self.model, ids, mask)
                entering = self._entering(replay, gone, wanted)
                current = replay.layers(wanted[-1], gone, entering[wanted[-1]])
                dense = current
                for first in branch:
                    dense = replay.layers(first, frozenset(), entering[first])
                observer.on_batch(batch, replay, current, dense)
                for layer in order:
                    observer.on_trial(layer, batch, replay, replay.layers(layer + 1, gone, entering[layer]))
                    advance(batch.size)

    def _entering(self, replay: Replay, gone: frozenset[int], wanted: Sequence[int]) -> dict[int, torch.Tensor]:
        """The hidden states that enter each of the given layers, ascending, of the current model."""
        states, result = replay.first_states, {}
        for index in range(wanted[-1] + 1):
            if index in wanted:
                result[index] = states
            if index not in gone and index < wanted[-1]:
                states = replay.layer(index, states)
        return result
