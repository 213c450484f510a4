"""What leaves the last decoder layer for sequences without padding, with either engine."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglp_llm.engine.observer import Batch
from sglp_llm.engine.replay import Replay
from sglp_llm.engine.states import state_store
from sglp_llm.engine.streamed import Replays, Step, layers_in_turn
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating
from sglp_llm.progress import Progress, silent


def final_states(
    model: DecoderModel,
    input_ids: torch.Tensor,
    batch_size: int = 1,
    progress: Progress = silent,
    description: str = "Scoring",
) -> Iterator[tuple[Batch, Replay, torch.Tensor]]:
    """Runs all decoder layers and yields batch by batch what leaves the last one, in inference mode.

    Streamed layers are loaded once for all sequences, whose hidden states are stored between the layers.

    Args:
        model: Resident or streamed.
        input_ids: ``[sequences, tokens]``, without padding.
        batch_size: Sequences that go through a layer together.
        progress: Called with the number of layers times batches that are done.
        description: For the progress bar.

    Yields:
        The batch, its replay (for the head), and ``[batch, tokens, hidden]`` before the final norm.
    """
    parts = dict(zip(range(0, len(input_ids), batch_size), input_ids.split(batch_size), strict=True))
    steps = [Step(Batch(first, len(ids), None), ids.to(model.input_device), None) for first, ids in parts.items()]
    replays = Replays(model)
    with (
        torch.inference_mode(),
        evaluating(model.model),
        state_store(model) as store,
        progress(description, model.num_layers * len(steps)) as advance,
    ):
        if model.weights is None:
            for step in steps:
                states = replays.first_states(step)
                for index in range(model.num_layers):
                    states = replays.of(step).layer(index, states)
                    advance(1)
                yield step.batch, replays.of(step), states
            return
        for step in steps:
            store.put(0, step.batch, replays.first_states(step))
        for index, _ in layers_in_turn(model, range(model.num_layers)):
            for step in steps:
                store.put(0, step.batch, replays.of(step).layer(index, store.get(0, step.batch)))
                advance(1)
        for step in steps:
            yield step.batch, replays.of(step), store.get(0, step.batch)
