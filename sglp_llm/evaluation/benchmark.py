"""Speed and memory of a model, or of two that are measured in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from sglp_llm.errors import UserError
from sglp_llm.evaluation.costs import Costs, count_costs
from sglp_llm.evaluation.memory import Peak, devices_of, held, synchronize, wake, watch_peak
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating
from sglp_llm.models.opened import OpenedModel
from sglp_llm.progress import Advance, Progress, silent


@dataclass(frozen=True)
class BenchmarkSettings:
    """The settings of a benchmark. Token ids are random: speed does not depend on them.

    Attributes:
        prompt_len: Tokens of a prompt.
        new_tokens: Tokens that are generated after it, end-of-text tokens ignored; the first one is timed with the prompt.
        batch: Batch size of the second measurement; the first one has a single sequence.
        warmup: Rounds that are not timed; peak memory is measured in them.
        repeats: Timed rounds.
        seed: Seed of the token ids.
    """

    prompt_len: int = 128
    new_tokens: int = 32
    batch: int = 8
    warmup: int = 1
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, why in (
            ("prompt_len", 1, ""),
            ("new_tokens", 2, ": the first one is timed with the prompt"),
            ("batch", 1, ""),
            ("warmup", 1, ": memory is measured in the warm-up"),
            ("repeats", 1, ""),
        ):
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name} must be at least {least}, not {value}{why}")

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that are measured."""
        return (1,) if self.batch == 1 else (1, self.batch)


@dataclass(frozen=True)
class Measured:
    """A quantity over the repeats.

    Attributes:
        median: Median of the values.
        lowest: The lowest value.
        highest: The highest value.
        values: One per repeat, in order.
    """

    median: float
    lowest: float
    highest: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Speed:
    """Speed at one batch size.

    Attributes:
        batch: Sequences at once.
        first_token_seconds: From the prompts on the device to the first new token of every sequence.
        prefill_tokens_per_second: Prompt tokens of all sequences over the time to the first token.
        decode_tokens_per_second: New tokens of all sequences after the first, over the time from the first token to the last.
    """

    batch: int
    first_token_seconds: Measured
    prefill_tokens_per_second: Measured
    decode_tokens_per_second: Measured


@dataclass(frozen=True)
class ModelBenchmark:
    """The results for one model.

    Attributes:
        model: Its name.
        dtype: The dtype of the computation.
        device: Where its parameters are, e.g. ``"cpu"``, ``"cuda:0 cuda:1"`` or ``"cuda:0 offloaded"``.
        costs: The counts, at a context of prompt and new tokens.
        speeds: One per batch size.
        peak_host_bytes: See ``host_method``; ``None`` where the system does not say.
        host_method: What ``peak_host_bytes`` is.
        peak_device_bytes: Bytes on CUDA devices beyond what was there before loading, weights included; ``None`` without any.
    """

    model: str
    dtype: str
    device: str
    costs: Costs
    speeds: tuple[Speed, ...]
    peak_host_bytes: int | None
    host_method: str
    peak_device_bytes: int | None


@dataclass(frozen=True)
class Greedy:
    """A timed greedy generation.

    Attributes:
        tokens: ``[batch, new tokens]``.
        first_seconds: From the prompt to the first token.
        rest_seconds: From the first token to the last.
    """

    tokens: torch.Tensor
    first_seconds: float
    rest_seconds: float


@dataclass
class _Runner:
    """A model being measured, with its times: batch size -> (seconds to the first token, seconds from there to the last)."""

    name: str
    decoder: DecoderModel
    devices: list[torch.device]
    prompts: dict[int, torch.Tensor]
    peak: Peak
    seconds: dict[int, list[tuple[float, float]]]


def benchmark(
    models: Sequence[OpenedModel], settings: BenchmarkSettings, progress: Progress = silent
) -> list[ModelBenchmark]:
    """Measures models in one run, alternating at every repeat, so that other load on the machine affects all of them.

    Args:
        models: Each is loaded, and stays in memory to the end. The peaks of a live model, which was in memory before, exclude
            its weights.
        settings: What is measured.
        progress: Reports every generation of a batch.

    Returns:
        One record per model, in order.

    Raises:
        UserError: Prompt and new tokens are more than the positions of a model.
    """
    for opened in models:
        _check_positions(opened, settings)
    wake()
    total = len(models) * len(settings.batches) * (settings.warmup + settings.repeats)
    with torch.inference_mode(), progress("Measuring", total) as advance:
        runners = [_warmed_up(opened, settings, advance) for opened in models]
        for repeat in range(settings.repeats):
            for runner in runners if repeat % 2 == 0 else reversed(runners):  # so that no model always comes second
                for batch, times in runner.seconds.items():
                    times.append(_timed(runner, batch, settings.new_tokens))
                    advance(1)
    return [_result(runner, settings) for runner in runners]


def ratios(over: Measured, under: Measured) -> Measured:
    """The ratio of one quantity of two models that were measured in turns, repeat by repeat."""
    return measured([value / base for value, base in zip(over.values, under.values, strict=True)])


def greedy(model: DecoderModel, prompt: torch.Tensor, new_tokens: int, devices: Sequence[torch.device] = ()) -> Greedy:
    """Generates exactly ``new_tokens`` tokens greedily with the KV cache; end-of-text tokens do not stop it.

    Args:
        model: The model, in evaluation mode.
        prompt: ``[batch, tokens]``, on the model's input device.
        new_tokens: At least 1.
        devices: CUDA devices to wait for before the clock is read.
    """
    synchronize(devices)
    start = time.perf_counter()
    output = model.model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(dim=-1).to(prompt.device)
    synchronize(devices)
    first = time.perf_counter()
    tokens = [token]
    for _ in range(new_tokens - 1):
        output = model.model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(dim=-1).to(prompt.device)
        tokens.append(token)
    synchronize(devices)
    last = time.perf_counter()
    return Greedy(torch.cat(tokens, dim=1), first - start, last - first)


def random_prompts(decoder: DecoderModel, batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Token ids ``[batch, tokens]`` on the model's input device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(int(decoder.config.vocab_size), (batch, tokens), generator=generator)
    device = decoder.input_device
    # Where embeddings are offloaded, accelerate moves them to the ids' device.
    return ids.to(torch.device("cpu") if device.type == "meta" else device)


def _check_positions(opened: OpenedModel, settings: BenchmarkSettings) -> None:
    limit = getattr(opened.text_config, "max_position_embeddings", None)
    if limit is not None and settings.prompt_len + settings.new_tokens > limit:
        raise UserError(
            f"{opened.identity.name}: {settings.prompt_len} prompt tokens and {settings.new_tokens} new ones are more than "
            f"the model's {limit} positions; lower prompt_len or new_tokens"
        )


def _warmed_up(opened: OpenedModel, settings: BenchmarkSettings, advance: Advance) -> _Runner:
    """Loads a model and runs the warm-up rounds, in which its peak memory is measured."""
    before = held()
    decoder = opened.load()
    ids = random_prompts(decoder, settings.batch, settings.prompt_len, settings.seed)
    devices = devices_of(decoder.model)
    prompts = {batch: ids[:batch] for batch in settings.batches}
    runner = _Runner(opened.identity.name, decoder, devices, prompts, Peak(), {batch: [] for batch in prompts})
    with watch_peak(devices, before) as runner.peak:
        for _ in range(settings.warmup):
            for batch in prompts:
                _timed(runner, batch, settings.new_tokens)
                advance(1)
    return runner


def _timed(runner: _Runner, batch: int, new_tokens: int) -> tuple[float, float]:
    with evaluating(runner.decoder.model):
        result = greedy(runner.decoder, runner.prompts[batch], new_tokens, runner.devices)
    return result.first_seconds, result.rest_seconds


def _result(runner: _Runner, settings: BenchmarkSettings) -> ModelBenchmark:
    model = runner.decoder.model
    places = sorted({str(parameter.device).replace("meta", "offloaded") for parameter in model.parameters()})
    return ModelBenchmark(
        model=runner.name,
        dtype=str(model.dtype).removeprefix("torch."),
        device=" ".join(places),
        costs=count_costs(runner.decoder, settings.prompt_len + settings.new_tokens),
        speeds=tuple(_speed(batch, times, settings) for batch, times in runner.seconds.items()),
        peak_host_bytes=runner.peak.host,
        host_method=runner.peak.host_method,
        peak_device_bytes=runner.peak.device,
    )


def _speed(batch: int, seconds: Sequence[tuple[float, float]], settings: BenchmarkSettings) -> Speed:
    prompt, rest = batch * settings.prompt_len, batch * (settings.new_tokens - 1)
    return Speed(
        batch=batch,
        first_token_seconds=measured([first for first, _ in seconds]),
        prefill_tokens_per_second=measured([prompt / first for first, _ in seconds]),
        decode_tokens_per_second=measured([rest / after for _, after in seconds]),
    )


def measured(values: Sequence[float]) -> Measured:
    """The quantity over the repeats, from its values."""
    return Measured(median(values), min(values), max(values), tuple(values))
