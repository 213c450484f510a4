"""Trials on a model with streamed layers: every layer is loaded once and run for all trials."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglp_llm.engine.states import state_store
from sglp_llm.engine.streamed import Replays, Step, layers_in_turn
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating
from sglp_llm.progress import Progress
from sglp_llm.trials.observer import Removed, TrialObserver, split_at


def run_streamed_trials(
    model: DecoderModel,
    steps: Sequence[Step],
    wanted: Sequence[Removed],
    observer: TrialObserver,
    progress: Progress,
    description: str,
    bfloat16: bool = False,
) -> None:
    """Like `sglp_llm.trials.trials.Trials.run`, but layer by layer instead of batch by batch.

    The hidden states of all trials are in the store: ``[trials, sequences, tokens, hidden]``. Sets that agree on the layers so
    far share a slot, which is keyed by the first of them.
    """
    assert model.weights is not None
    replays = Replays(model, bfloat16)
    groups = [observer.with_reference(wanted)]
    needed = [index for index in range(model.num_layers) if any(index not in removed for removed in groups[0])]
    with (
        evaluating(model.model),
        state_store(model) as store,
        torch.inference_mode(),
        progress(description, len(needed)) as advance,
    ):
        for step in steps:
            store.put(groups[0][0], step.batch, replays.first_states(step))
        for index, _ in layers_in_turn(model, needed):
            keeping, removing = [], []
            for group in groups:
                keep, remove = split_at(index, group)
                for part in (keep, remove):
                    if part and part[0] != group[0]:
                        store.share(group[0], part[0])
                keeping += [keep] if keep else []
                removing += [remove] if remove else []
            for step in steps:
                replay = replays.of(step)
                for group in keeping:
                    store.put(group[0], step.batch, replay.layer(index, store.get(group[0], step.batch)))
            groups = [*keeping, *removing]
            advance(1)
        for step in steps:
            replay = replays.of(step)
            if observer.reference is not None:
                observer.on_reference(step.batch, replay, store.get(observer.reference, step.batch))
            for removed in wanted:
                observer.on_trial(removed, step.batch, replay, store.get(removed, step.batch))
