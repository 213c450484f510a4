"""Predicted, free and measured memory, as text and as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from transformers import PretrainedConfig

from sglp_llm.calibration import AUTO, named_text
from sglp_llm.calibration.specs import SELF
from sglp_llm.cli.quiet import say
from sglp_llm.compensation import NONE
from sglp_llm.criteria import make_criterion
from sglp_llm.evaluation.memory import peak_so_far
from sglp_llm.healing.heal import DEFAULT_TOKENS
from sglp_llm.memory import EngineMemory, FreeMemory, MemoryPlan
from sglp_llm.memory.duration import Duration
from sglp_llm.memory.peaks import USABLE, fits
from sglp_llm.memory.prediction import computed_in
from sglp_llm.plan import Recipe
from sglp_llm.sizes import show_bytes


class MemoryLines:
    """The first and the last line of a run: the prediction on stderr, like progress, and the measured peak on stdout.

    Args:
        lines: More to say with the prediction, such as `price_line`; ``None`` is nothing.
    """

    def __init__(self, *lines: str | None) -> None:
        self._forecast: EngineMemory | None = None
        self._lines = [line for line in lines if line is not None]

    def print_forecast(self, memory: EngineMemory, free: FreeMemory) -> None:
        """Prints the prediction; called before the weights are loaded (`OnForecast`)."""
        self._forecast = memory
        say(forecast_line(memory, free))
        for line in self._lines:
            say(line)

    def print_peak(self) -> None:
        """Prints the peak memory of this process so far."""
        peak = peak_so_far()
        parts = [
            f"{show_bytes(size)} on the {place}"
            for place, size in (("host", peak.host), ("device", peak.device))
            if size is not None
        ]
        print(f"Peak memory       {', '.join(parts) or 'the system does not say'}")

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``: the engine and its predicted peaks, ``None`` without an analysis, and the measured ones, in bytes."""
        peak, predicted = peak_so_far(), self._forecast
        return {
            "engine": None if predicted is None else predicted.engine,
            "predicted_host_bytes": None if predicted is None else predicted.host_peak,
            "predicted_device_bytes": None if predicted is None else predicted.device_peak,
            "peak_host_bytes": peak.host,
            "peak_device_bytes": peak.device,
        }


def forecast_line(memory: EngineMemory, free: FreeMemory) -> str:
    """``Memory: about 1.1 GB predicted (resident engine), 14 GB free``."""
    pairs = [(memory.host_peak, free.host, "")]
    if memory.device_peak is not None:
        pairs = [(memory.device_peak, free.device, " on the device"), (memory.host_peak, free.host, " on the host")]
    if memory.disk:
        pairs.append((memory.disk, free.disk, " on disk"))
    predicted = " and ".join(show_bytes(size) + place for size, _, place in pairs)
    there = " and ".join("unknown" if size is None else show_bytes(size) for _, size, _ in pairs)
    return f"Memory: about {predicted} predicted ({memory.engine} engine), {there} free"


def text_line(recipe: Recipe) -> str | None:
    """``Text: wikitext2:1 c4:1``, where the recipe leaves it open; ``None`` where it names one."""
    if recipe.calibration != AUTO:
        return None
    text = named_text(AUTO)
    return f"Text: {text}{', which the model writes, because the Hub cannot be read' if text == SELF else ''}"


def price_line(recipe: Recipe) -> str | None:
    """``Cost: about 262,144 trial tokens (search), 16,384 calibration tokens to fit (linear), 20,480 training tokens (heal)``.

    ``None`` if there are none.

    Raises:
        UserError: A criterion or an option does not exist.
    """
    prices = []
    for name in (recipe.deciding_criterion, *recipe.also):
        sequences = min(recipe.trial_samples or recipe.samples, recipe.samples)
        criterion = make_criterion(name, 1, recipe.seed, recipe.options.get(name))
        prices.append((criterion.price(sequences, recipe.seq_len), name))
    if recipe.compensate != NONE:
        prices.append((f"{recipe.samples * recipe.seq_len:,} calibration tokens to fit", recipe.compensate))
    if (healing := recipe.healing) is not None:
        units = {
            "minutes": "minutes of training",
            "epochs": "passes over the training text",
            "tokens": "training tokens",
        }
        given = next((name for name in units if getattr(healing, name) is not None), None)
        number = DEFAULT_TOKENS if given is None else getattr(healing, given)
        prices.append((f"{number:,} {units[given or 'tokens']}", "heal"))
    said = [f"{price} ({name})" for price, name in prices if price]
    return f"Cost: {', '.join(said)}" if said else None


def title(name: str, config: PretrainedConfig, recipe: Recipe, gguf: bool) -> str:
    """The line above the table: the planned run."""
    dtype = str(computed_in(config, recipe, gguf)).removeprefix("torch.")
    criteria = ", ".join([recipe.criterion, *recipe.also])
    if recipe.compensate != NONE:
        criteria += f" + {recipe.compensate}"
    return f"{name}: {criteria} in {dtype}, {recipe.samples} x {recipe.seq_len} tokens"


def advice(plan: MemoryPlan, free: FreeMemory, chosen: str) -> str:
    """The line below the table: which engine ``auto`` chooses here, and why."""
    resident, streamed = fits(plan.resident, free), fits(plan.streamed, free)
    why = "both fit" if resident and streamed else "the other does not fit" if resident or streamed else "neither fits"
    return f"Engine auto takes here: {chosen} ({why}; fits = at most {USABLE:.0%} of what is free)"


def table(plan: MemoryPlan, free: FreeMemory) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each engine's parts on host and device, their sum, and what is free there."""
    columns = []
    for memory in (plan.resident, plan.streamed):
        columns.append((f"{memory.engine}, host", memory.host, free.host, memory.disk))
        if memory.device is not None:
            columns.append((f"{memory.engine}, device", memory.device, free.device, 0))
    names = sorted(dict.fromkeys(name for _, parts, _, _ in columns for name in parts), key="runtime".__eq__)
    rows = [[name, *(_cell(parts.get(name)) for _, parts, _, _ in columns)] for name in names]
    rows.append(["peak", *(_cell(sum(parts.values())) for _, parts, _, _ in columns)])
    rows.append(["free now", *(_cell(there) for _, _, there, _ in columns)])
    if plan.streamed.disk:
        rows.append(["scratch on disk", *(_cell(disk or None) for _, _, _, disk in columns)])
        rows.append(["free on disk", *(_cell(free.disk if disk else None) for _, _, _, disk in columns)])
    return ["", *(title for title, _, _, _ in columns)], rows


def _cell(size: int | None) -> str:
    return "-" if size is None else show_bytes(size)


def time_line(device: str, duration: Duration) -> str:
    """``Time on h100, streamed engine: about 14 s (disk 14 s, products 1.9 s, ...): the disk dominates``."""
    terms = sorted(duration.terms.items(), key=lambda term: -term[1])
    said = ", ".join(f"{name} {seconds:.2g} s" for name, seconds in terms)
    return f"Time on {device}, {duration.engine} engine: about {duration.seconds:.2g} s ({said}): mostly {duration.dominating}"


def to_dict(plan: MemoryPlan, free: FreeMemory, chosen: str, durations: Iterable[Duration] = ()) -> dict[str, Any]:
    """Everything in bytes, and where a device was named in seconds, for ``--json``."""
    engines = {
        each.engine: {**asdict(each), "host_peak": each.host_peak, "device_peak": each.device_peak}
        for each in (plan.resident, plan.streamed)
    }
    times = {each.engine: {"seconds": each.seconds, "terms": dict(each.terms)} for each in durations}
    return {"engines": engines, "free": asdict(free), "auto": chosen, **({"times": times} if times else {})}
