"""Trials on a model with streamed layers: every layer is brought once a round, and takes all trials one step further."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from sglp_llm.engine.modes import evaluating
from sglp_llm.engine.states import state_store
from sglp_llm.engine.streamed import Replays, Step, layers_in_turn
from sglp_llm.engine.trial_observer import TrialObserver
from sglp_llm.loading import DecoderModel
from sglp_llm.progress import Progress

_CURRENT, _DENSE = "current", "dense"  # the slots beside the trials', which are the tried layers


def run_streamed_trials(
    model: DecoderModel,
    steps: Sequence[Step],
    removed: frozenset[int],
    candidates: Sequence[int],
    observer: TrialObserver,
    progress: Progress,
    description: str,
) -> None:
    """What `sglp_llm.engine.trials.Trials.run` shows, layer by layer instead of batch by batch.

    The hidden states of all trials wait in the store: ``[trials, sequences, tokens, hidden]``.
    """
    assert model.weights is not None
    replays = Replays(model)
    dense_from = min(removed) if removed and observer.needs_dense else None
    trials: list[Hashable] = []
    with (
        evaluating(model.model),
        state_store(model.input_device, model.weights.scratch) as store,
        torch.inference_mode(),
        progress(description, model.num_layers) as advance,
    ):
        for step in steps:
            store.put(_CURRENT, step.batch, replays.first_states(step))
        # The last layers may be removed as well: a round that needs no layer still counts them for the progress bar.
        wanted = [index for index in range(model.num_layers) if index not in removed or dense_from is not None]
        for index, _ in layers_in_turn(model, wanted):
            branches: list[Hashable] = []
            if index not in removed:
                branches = [_CURRENT, *trials]
            if dense_from is not None and index == dense_from:
                store.share(_CURRENT, _DENSE)
            if dense_from is not None and index >= dense_from:
                branches.append(_DENSE)
            if index in candidates:
                store.share(_CURRENT, index)
                trials.append(index)
            for step in steps:
                replay = replays.of(step)
                for branch in branches:
                    store.put(branch, step.batch, replay.layer(index, store.get(branch, step.batch)))
            advance(1)
        advance(model.num_layers - len(wanted))
        for step in steps:
            replay = replays.of(step)
            current = store.get(_CURRENT, step.batch)
            dense = current if dense_from is None else store.get(_DENSE, step.batch)
            observer.on_batch(step.batch, replay, current, dense)
            for layer in sorted(candidates):
                observer.on_trial(layer, step.batch, replay, store.get(layer, step.batch))
