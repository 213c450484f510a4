"""Benchmark results, as text and as plain data. With two models the first one is the baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sglp_llm.evaluation.benchmark import BenchmarkSettings, Measured, ModelBenchmark, ratios
from sglp_llm.sizes import show_count

_Show = Callable[[float], str]


def to_dict(measured: Sequence[ModelBenchmark], settings: BenchmarkSettings) -> dict[str, Any]:
    """Everything, for ``--json``: ``baseline`` and ``ratios`` (model over baseline) are ``None`` without a baseline."""
    *baseline, model = measured
    return {
        "settings": asdict(settings),
        "environment": _environment(measured),
        "model": asdict(model),
        "baseline": asdict(baseline[0]) if baseline else None,
        "ratios": {line.name: _plain(_ratio(line.values)) for line in _lines(measured)} if baseline else None,
    }


def heading(measured: Sequence[ModelBenchmark], settings: BenchmarkSettings) -> list[str]:
    """The lines above the table: what was measured, and where."""
    *baseline, model = measured
    lines = [f"Model       {model.model} ({model.dtype}, {model.device})"]
    lines += [f"Baseline    {other.model} ({other.dtype}, {other.device})" for other in baseline]
    environment = _environment(measured)
    gpu = f", {environment['gpu']}" if environment["gpu"] else ""
    lines.append(f"Machine     torch {environment['torch']}, {environment['threads']} threads{gpu}")
    lines.append(
        f"Runs        {settings.prompt_len} prompt + {settings.new_tokens} new tokens, {settings.warmup} warm-up, "
        f"{settings.repeats} timed: median (lowest..highest)"
    )
    lines.append(f"Host peak   {model.host_method}")
    return lines


def table(measured: Sequence[ModelBenchmark]) -> tuple[list[str], list[list[str]]]:
    """The columns and the rows; with a baseline: baseline, model, model over baseline."""
    rows, section = [], ""
    for line in _lines(measured):
        if line.section and line.section != section:
            rows.append([line.section, *[""] * len(measured), *([""] if len(measured) > 1 else [])])
        section = line.section
        cells = [_cell(value, line.show) for value in line.values]
        if len(measured) > 1:
            cells.append(_cell(_ratio(line.values), lambda ratio: f"{ratio:.2f}"))
        rows.append([f"  {line.label}" if section else line.label, *cells])
    return (["", "baseline", "model", "ratio"] if len(measured) > 1 else ["", "model"]), rows


@dataclass(frozen=True)
class _Line:
    """One quantity of every model.

    Attributes:
        name: Key in JSON.
        section: Heading above it in the table; empty for none.
        label: Label in the table.
        show: Formats a value.
        values: One per model.
    """

    name: str
    section: str
    label: str
    show: _Show
    values: list[int | Measured | None]


def _lines(measured: Sequence[ModelBenchmark]) -> Iterator[_Line]:
    context = f"at {measured[0].costs.context} tokens"
    counts: list[tuple[str, str, str, _Show]] = [
        ("layers", "", "Decoder layers", _count),
        ("parameters", "", "Parameters", _count),
        ("layer_parameters", "", "  in the layers", _count),
        ("weight_bytes", "", "Weights", _bytes),
        ("kv_cache_bytes_per_token", "", "KV cache a token", _bytes),
        ("flops_per_token", context, "FLOPs a token", _count),
        ("kv_cache_bytes", context, "KV cache", _bytes),
    ]
    for name, section, label, show in counts:
        yield _Line(name, section, label, show, [getattr(one.costs, name) for one in measured])
    for index, first in enumerate(measured[0].speeds):
        speeds = [one.speeds[index] for one in measured]
        rates: list[tuple[str, str, _Show]] = [
            ("first_token_seconds", "first token, ms", _milliseconds),
            ("prefill_tokens_per_second", "prefill tok/s", _three_digits),
            ("decode_tokens_per_second", "decode tok/s", _three_digits),
        ]
        for name, label, show in rates:
            values = [getattr(speed, name) for speed in speeds]
            yield _Line(f"{name}_batch_{first.batch}", f"batch {first.batch}", label, show, values)
    yield _Line("peak_host_bytes", "", "Peak host memory", _bytes, [one.peak_host_bytes for one in measured])
    if any(one.peak_device_bytes is not None for one in measured):
        yield _Line("peak_device_bytes", "", "Peak GPU memory", _bytes, [one.peak_device_bytes for one in measured])


def _ratio(values: Sequence[int | Measured | None]) -> float | Measured | None:
    base, value = values
    if isinstance(base, Measured) and isinstance(value, Measured):
        return ratios(value, base)
    if isinstance(base, Measured) or isinstance(value, Measured) or value is None or not base:
        return None
    return value / base


def _plain(value: float | Measured | None) -> Any:
    return asdict(value) if isinstance(value, Measured) else value


def _cell(value: float | Measured | None, show: _Show) -> str:
    if value is None:
        return "-"
    if isinstance(value, Measured):
        return f"{show(value.median)} ({show(value.lowest)}..{show(value.highest)})"
    return show(value)


def _environment(measured: Sequence[ModelBenchmark]) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if any("cuda" in one.device for one in measured) else None
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "gpu": gpu}


def _count(number: float) -> str:
    return show_count(int(number))


def _bytes(number: float) -> str:
    return show_count(int(number)) + "B"


def _milliseconds(seconds: float) -> str:
    return _three_digits(seconds * 1000)


def _three_digits(number: float) -> str:
    if number >= 10_000:
        return show_count(round(number))
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
