"""Trials: what would the model compute without these layers, for many sets of them, at the cost of what they do not share.

Sets that agree on the first layers share the hidden states behind those: the sets form a tree, and every edge of it runs once.
Head and loss run once a set. Each of L layers alone costs L(L-1)/2 + L - 1 layer passes and L heads instead of L(L-1) and L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from sglp_llm.calibration import CalibrationSet
from sglp_llm.engine.modes import evaluating
from sglp_llm.engine.replay import Replay
from sglp_llm.engine.resident import batches
from sglp_llm.engine.streamed import steps_of
from sglp_llm.models.loading import DecoderModel
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent
from sglp_llm.trials.journal import Journal
from sglp_llm.trials.observer import Removed, TrialObserver, split_at
from sglp_llm.trials.streamed import run_streamed_trials


class Trials:
    """Removes sets of layers, tentatively.

    Args:
        model: The model.
        calibration: The sequences.
        batch_size: Sequences computed at once.
        progress: Told the trials that are done, in sequences.
        processes: Each takes its share of the sequences; all must run the same trials.
        journal: Keeps what is finished, see `once`; the main process's is used.
    """

    def __init__(
        self,
        model: DecoderModel,
        calibration: CalibrationSet,
        batch_size: int = 1,
        progress: Progress = silent,
        processes: Processes = ALONE,
        journal: Journal | None = None,
    ) -> None:
        self.model = model
        self.calibration = calibration
        self.batch_size = batch_size
        self.progress = progress
        self.processes = processes
        self._journal = journal

    def run(
        self,
        sets: Iterable[Removed],
        observer: TrialObserver,
        description: str = "Trials",
        sequences: range | None = None,
    ) -> None:
        """Shows the observer what the model computes without each of these sets of layers.

        Args:
            sets: Each a different set of layer indices.
            observer: Told what comes out; its reference, where it has one, is a part of every set.
            description: For the progress bar.
            sequences: Which of the calibration sequences; ``None`` means all.
        """
        wanted = sorted(set(sets), key=sorted)
        everything = range(len(self.calibration.input_ids)) if sequences is None else sequences
        share = self.processes.share(len(everything), observer.together)
        share = everything[share.start : share.stop]
        if self.model.weights is None:
            self._run_resident(wanted, observer, share, description)
        else:
            steps = steps_of(self.model, self.calibration, self.batch_size, share)
            run_streamed_trials(self.model, steps, wanted, observer, self.progress, description)
        observer.on_end(wanted, self.processes)

    def once(self, piece: str, count: int, compute: Callable[[], list[float]]) -> list[float]:
        """What an earlier run has kept in the journal under this name, or else what ``compute`` returns, which is kept then.

        Args:
            piece: Everything that the numbers depend on beside the journal's setting.
            count: How many numbers they are.
            compute: Gives the same numbers in all processes.
        """
        if self._journal is None:
            return compute()
        known = self._journal.get(piece) if self.processes.is_main else None
        # The main process decides for all: those that compute alone would wait for the others for ever.
        kept = torch.tensor([0.0] * (1 + count) if known is None else [1.0, *known], dtype=torch.float64)
        is_kept, *numbers = self.processes.sum(kept).tolist()
        if not is_kept:
            numbers = compute()
            if self.processes.is_main:
                self._journal.once(piece, lambda: numbers)
        return numbers

    def _run_resident(self, wanted: Sequence[Removed], observer: TrialObserver, share: range, description: str) -> None:
        with (
            torch.inference_mode(),
            evaluating(self.model.model),
            self.progress(description, len(wanted) * len(share)) as advance,
        ):
            for batch, ids, mask in batches(self.calibration, self.batch_size, self.model.input_device, share):
                replay = Replay(self.model, ids, mask)
                for removed, final in self._outcomes(replay, observer.with_reference(wanted)):
                    if removed == observer.reference:
                        observer.on_reference(batch, replay, final)
                    if removed in wanted:
                        observer.on_trial(removed, batch, replay, final)
                        advance(batch.size)

    def _outcomes(self, replay: Replay, sets: Sequence[Removed]) -> Iterator[tuple[Removed, torch.Tensor]]:
        """What leaves the last layer without each set. A set comes before those that it is a part of."""
        waiting = [(0, replay.first_states, list(sets))]
        while waiting:
            start, states, group = waiting.pop()
            for index in range(start, self.model.num_layers):
                group, leaving = split_at(index, group)
                if group and leaving:
                    waiting.append((index + 1, states, leaving))
                if group:
                    states = replay.layer(index, states)
                else:
                    group = leaving
            yield group[0], states
