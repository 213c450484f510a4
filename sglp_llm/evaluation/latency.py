"""Decode time of a model at a few depths, measured in turns."""

from __future__ import annotations

from statistics import median

import torch

from sglp_llm.checkpoint.export import shortened
from sglp_llm.errors import UserError
from sglp_llm.evaluation.benchmark import greedy, random_prompts
from sglp_llm.evaluation.memory import devices_of
from sglp_llm.models.modes import evaluating
from sglp_llm.models.opened import OpenedModel
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent
from sglp_llm.records import DecodeTimes

PROMPT_TOKENS = 128
NEW_TOKENS = 16
ROUNDS = 5


def measure_decode(opened: OpenedModel, progress: Progress = silent, processes: Processes = ALONE) -> DecodeTimes:
    """Measures the whole model and two shortened ones of three quarters and half of its depth, at batch size 1.

    The depths take turns, so that other load on the machine affects all of them; the median of five rounds counts, after one that
    warms up. The model is restored after each turn. Which layers are left out hardly matters: they are evenly spaced.

    Args:
        opened: The model; it is loaded.
        progress: Reports every generation.
        processes: The main process measures, and all return its times.

    Raises:
        UserError: The decoder layers are not in memory together, or there is only one.
    """
    if opened.streamed:
        raise UserError(
            "target_latency is measured on the model in memory, and the streamed engine holds one layer at a time: "
            "use --engine resident, or give a ratio or a number of layers"
        )
    depth = opened.num_layers
    depths = sorted({depth, max(1, round(depth * 0.75)), max(1, round(depth * 0.5))}, reverse=True)
    if len(depths) < 2:
        raise UserError("target_latency: a model of one decoder layer cannot be shortened")
    seconds = torch.zeros(len(depths), dtype=torch.float64)
    if processes.is_main:
        seconds += torch.tensor(_medians(opened, depths, progress), dtype=torch.float64)
    device = opened.load().input_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return DecodeTimes(tuple(depths), tuple(processes.sum(seconds).tolist()), name)


def _medians(opened: OpenedModel, depths: list[int], progress: Progress) -> list[float]:
    """Seconds a token at each depth."""
    decoder = opened.load()
    devices = devices_of(decoder.model)
    limit = getattr(opened.text_config, "max_position_embeddings", None) or PROMPT_TOKENS + NEW_TOKENS
    prompt_tokens = max(1, min(PROMPT_TOKENS, limit - NEW_TOKENS))
    ids = random_prompts(decoder, 1, prompt_tokens)
    times: dict[int, list[float]] = {depth: [] for depth in depths}
    with (
        torch.inference_mode(),
        evaluating(decoder.model),
        progress("Timing", len(depths) * (1 + ROUNDS)) as advance,
    ):
        for _ in range(1 + ROUNDS):
            for depth, measured in times.items():
                with shortened(decoder.model, _removed(opened, opened.num_layers - depth)):
                    measured.append(greedy(decoder, ids, NEW_TOKENS, devices).rest_seconds / (NEW_TOKENS - 1))
                advance(1)
    return [median(measured[1:]) for measured in times.values()]


def _removed(opened: OpenedModel, count: int) -> list[int]:
    """So many layers that can go together, evenly spaced where all can."""
    depth = opened.num_layers
    spaced = [index * depth // count for index in range(count)]
    return sorted(opened.staying.mended(spaced, range(depth)) or spaced) if opened.staying else spaced
