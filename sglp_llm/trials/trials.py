"""Trials: runs the model without each of many sets of layers, and computes common prefixes once.

Sets that agree on the first layers share the hidden states after those layers: the sets form a tree, and every edge of it runs
once. Head and loss run once per set. To try each of L layers alone takes L(L-1)/2 + L - 1 layer passes and L heads, instead of
L(L-1) and L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from sglp_llm.calibration import CalibrationSet
from sglp_llm.engine.replay import Replay
from sglp_llm.engine.resident import batches
from sglp_llm.engine.streamed import steps_of
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent
from sglp_llm.trials.journal import Journal
from sglp_llm.trials.observer import Removed, TrialObserver, split_at
from sglp_llm.trials.streamed import run_streamed_trials


class Trials:
    """Runs the model without sets of layers; the model itself is not changed.

    Args:
        model: The model.
        calibration: The sequences.
        batch_size: Sequences per forward pass.
        progress: Reports finished trials x sequences; with streamed layers finished layers.
        processes: Each takes its share of the sequences; all must run the same trials.
        journal: Stores finished results, see `once`; only the main process's journal is used.
        bfloat16: Multiply matrices in bfloat16, whatever the model's dtype; what observers compute stays in theirs.
    """

    def __init__(
        self,
        model: DecoderModel,
        calibration: CalibrationSet,
        batch_size: int = 1,
        progress: Progress = silent,
        processes: Processes = ALONE,
        journal: Journal | None = None,
        bfloat16: bool = False,
    ) -> None:
        self.model = model
        self.calibration = calibration
        self.batch_size = batch_size
        self.progress = progress
        self.processes = processes
        self._journal, self._bfloat16 = journal, bfloat16

    def run(
        self,
        sets: Iterable[Removed],
        observer: TrialObserver,
        description: str = "Trials",
        sequences: range | None = None,
    ) -> None:
        """Runs the model without each of these sets of layers, and calls the observer with the results.

        Args:
            sets: Sets of layer indices to remove.
            observer: Called with the results. Its reference, if it has one, must be a subset of every set.
            description: For the progress bar.
            sequences: Indices of the calibration sequences to use; ``None`` means all.
        """
        wanted = sorted(set(sets), key=sorted)
        everything = range(len(self.calibration.input_ids)) if sequences is None else sequences
        share = self.processes.share(len(everything), observer.together)
        share = everything[share.start : share.stop]
        if self.model.weights is None:
            self._run_resident(wanted, observer, share, description)
        else:
            steps = steps_of(self.model, self.calibration, self.batch_size, share)
            run_streamed_trials(self.model, steps, wanted, observer, self.progress, description, self._bfloat16)
        observer.on_end(wanted, self.processes)

    def once(self, piece: str, count: int, compute: Callable[[], list[float]]) -> list[float]:
        """The numbers stored in the journal under this name; if there are none, calls ``compute`` and stores its result.

        A collective call.

        Args:
            piece: Everything that the numbers depend on besides the journal's setting.
            count: Number of numbers.
            compute: Returns the same numbers in all processes.
        """
        if self._journal is None:
            return compute()
        known = self._journal.get(piece) if self.processes.is_main else None
        # The main process decides for all: ``compute`` has collective calls, in which all processes must take part.
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
                replay = Replay(self.model, ids, mask, self._bfloat16)
                for removed, final in self._outcomes(replay, observer.with_reference(wanted)):
                    if removed == observer.reference:
                        observer.on_reference(batch, replay, final)
                    if removed in wanted:
                        observer.on_trial(removed, batch, replay, final)
                        advance(batch.size)

    def _outcomes(self, replay: Replay, sets: Sequence[Removed]) -> Iterator[tuple[Removed, torch.Tensor]]:
        """Each set with the states that leave the last layer without it. A set is yielded before its supersets."""
        waiting = [(0, replay.first_states, list(sets))]
        while waiting:
            start, states, group = waiting.pop()
            for index in range(start, self.model.num_layers):
                group, removing = split_at(index, group)
                if group and removing:
                    waiting.append((index + 1, states, removing))
                if group:
                    states = replay.layer(index, states)
                else:
                    group = removing
            yield group[0], states
