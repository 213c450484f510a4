"""The losses of sequences under a model with streamed layers: each layer is loaded once for all of them."""

from __future__ import annotations

import torch

from sglp_llm.engine import Batch
from sglp_llm.engine.head import losses
from sglp_llm.engine.states import state_store
from sglp_llm.engine.streamed import Replays, Step, layers_in_turn
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating
from sglp_llm.progress import Progress, silent


def streamed_losses(
    model: DecoderModel, input_ids: torch.Tensor, batch_size: int = 1, progress: Progress = silent
) -> torch.Tensor:
    """The mean loss of each sequence, ``[sequences]`` float64 on the CPU.

    Args:
        model: With streamed layers.
        input_ids: ``[sequences, tokens]``, without padding.
        batch_size: Sequences computed at once.
        progress: Reports finished layers.
    """
    assert model.weights is not None
    replays = Replays(model)
    with (
        torch.inference_mode(),
        evaluating(model.model),
        state_store(model.input_device, model.weights.scratch) as store,
        progress("Scoring", model.num_layers) as advance,
    ):
        steps = []
        for first in range(0, len(input_ids), batch_size):
            ids = input_ids[first : first + batch_size].to(model.input_device)
            steps.append(Step(Batch(first, len(ids), None), ids, None))
            store.put(0, steps[-1].batch, replays.first_states(steps[-1]))
        for index, _ in layers_in_turn(model, range(model.num_layers)):
            for step in steps:
                store.put(0, step.batch, replays.of(step).layer(index, store.get(0, step.batch)))
            advance(1)
        return torch.cat([losses(replays.of(step), store.get(0, step.batch)).cpu() for step in steps])
