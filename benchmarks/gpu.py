"""Everything on an 8B-shaped random Llama in bfloat16 on one GPU, within nine minutes: a table, and JSON with ``--json FILE``.

The analysis (CKA and GradNorm) is compared with plain transformers forward and backward twice: with all weights frozen, which is
what the analysis has to do at least, and with a gradient for every weight, which flatters us. The floor is what the matrix
products of both passes need, 2 x parameters x tokens multiply-adds, at the rate of one large product on the same GPU. Then:
streamed over resident, measured over predicted peak memory, a search with trials, the compensations, and generation.

Needs torch, transformers, accelerate and safetensors, no network and no data. Without a GPU it runs on the CPU, to be tried:
``--layers 4 --hidden 256 --vocabulary 1000 --seq-len 64``. What does not fit into ``--minutes`` is left out, and says so.

    PYTHONPATH=. python3 benchmarks/gpu.py [--samples 16] [--seq-len 512] [--batch-size 8] [--pairs 3] [--folder WHERE]
        [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import describe
from random_llama import Shape, write_llama
from transformers import AutoConfig

from sglp_llm.analysis.observing import observe
from sglp_llm.calibration import CalibrationSet
from sglp_llm.compensation import FitSettings, get_method
from sglp_llm.criteria import SetCriterion
from sglp_llm.evaluation.benchmark import greedy
from sglp_llm.memory.prediction import predict_memory
from sglp_llm.models import find_source
from sglp_llm.models.devices import own_device
from sglp_llm.models.loading import DecoderModel, load_model, load_streamed
from sglp_llm.plan import Recipe

DEVICE = own_device()
GB = 1e9


class Results:
    """Rows of the table, as they are found; nothing is started after the time is up."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self.rows: dict[str, float | str] = {}

    def add(self, what: str, value: float | str, unit: str = "") -> None:
        self.rows[f"{what}{f' [{unit}]' if unit else ''}"] = value
        shown = f"{value:.3g}" if isinstance(value, float) else value
        print(f"{what:68} {shown} {unit}".rstrip(), flush=True)

    def measure(self, what: str, seconds: float, function: Callable[[], Any]) -> float | None:
        """The seconds that a call takes, as a row; ``None``, and a row that says why, where fewer than ``seconds`` are left."""
        if time.monotonic() + seconds > self._end:
            self.add(what, "left out: no time")
            return None
        start = synchronized()
        try:
            function()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.add(what, "out of memory")
            return None
        taken = synchronized() - start
        self.add(what, taken, "s")
        return taken


def synchronized() -> float:
    """The time, after all kernels that were launched have finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def begin_peak() -> int:
    """What is on the device now; `torch.cuda.max_memory_allocated` counts from here."""
    if DEVICE.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def products_a_second(size: int) -> float:
    """FLOPs a second of one bfloat16 matrix product, the best of ten."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = synchronized()
        a @ b
        best = min(best, synchronized() - start)
    return 2 * size**3 / best


def plain(model: DecoderModel, calibration: CalibrationSet, batch_size: int, frozen: bool) -> None:
    """Forward and backward by transformers alone, in the same steps; the logits of a step are in memory at once, as always."""
    model.model.requires_grad_(not frozen)
    for ids in calibration.input_ids.to(DEVICE).split(batch_size):
        model.model.zero_grad(set_to_none=False)
        states = model.model.get_input_embeddings()(ids).detach().requires_grad_(True)
        model.model(inputs_embeds=states, labels=ids, use_cache=False).loss.backward()
    model.model.zero_grad(set_to_none=True)
    model.model.requires_grad_(False)


def compare(
    results: Results, models: dict[str, DecoderModel], calibration: CalibrationSet, recipe: Recipe, pairs: int
) -> None:
    """The two engines and plain transformers in turn; medians after one warm-up round."""

    def analysis(model: DecoderModel, criterion: str) -> Callable[[], Any]:
        return lambda: observe(model, calibration, recipe, [criterion], similarity=True).scores()

    runs: dict[str, Callable[[], Any]] = {
        "resident": analysis(models["resident"], "gradnorm"),
        "streamed": analysis(models["streamed"], "gradnorm"),
        "plain, weights frozen": lambda: plain(models["resident"], calibration, recipe.batch_size, True),
        "plain, every weight's gradient": lambda: plain(models["resident"], calibration, recipe.batch_size, False),
        "resident, taylor": analysis(models["resident"], "taylor"),
        "streamed, taylor": analysis(models["streamed"], "taylor"),
    }
    times: dict[str, list[float]] = {}
    for pair in range(pairs + 1):
        for name, run in runs.items():
            if pair and name not in times and pair > 1:
                continue
            taken = results.measure(f"round {pair}: {name}", 20, run)
            if taken is not None and pair:
                times.setdefault(name, []).append(taken)
    middle = {name: median(values) for name, values in times.items()}
    for over, under in (
        ("resident", "plain, weights frozen"),
        ("resident", "plain, every weight's gradient"),
        ("streamed", "resident"),
        ("streamed, taylor", "resident, taylor"),
    ):
        if over in middle and under in middle:
            results.add(f"ratio: {over} / {under}", middle[over] / middle[under])


def gradnorm(model: DecoderModel, calibration: CalibrationSet, recipe: Recipe) -> None:
    observe(model, calibration, recipe, ["gradnorm"], similarity=True).scores()


def memory(
    results: Results, models: dict[str, DecoderModel], calibration: CalibrationSet, recipe: Recipe, plan: Any
) -> None:
    """Measured over predicted peaks; what the other engine's model takes is subtracted."""
    for engine, model in models.items():
        before = begin_peak()
        taken = results.measure(f"for its peak: {engine}", 20, lambda m=model: gradnorm(m, calibration, recipe))
        if taken is None:
            continue
        own = sum(parameter.nbytes for parameter in model.model.parameters() if not parameter.is_meta)
        measured = torch.cuda.max_memory_allocated() - before + own if DEVICE.type == "cuda" else 0
        predicted = getattr(plan, engine).device_peak
        if predicted:
            results.add(f"peak, {engine}: measured", measured / GB, "GB")
            results.add(f"peak, {engine}: predicted", predicted / GB, "GB")
            results.add(f"peak, {engine}: measured / predicted", measured / predicted)


def removals(results: Results, model: DecoderModel, calibration: CalibrationSet, recipe: Recipe) -> None:
    """A search with trials, and the compensations without an eighth of the layers."""
    drop = max(1, model.num_layers // 8)
    few = calibration.first(4)

    def search() -> None:
        criterion = observe(model, few, recipe, ["search"], similarity=False).criteria["search"]
        assert isinstance(criterion, SetCriterion)
        criterion.choose(drop, range(model.num_layers))

    results.measure(f"search for {drop} layers, 4 sequences", 60, search)
    removed = range(model.num_layers // 2, model.num_layers // 2 + drop)
    settings = FitSettings(batch_size=recipe.batch_size)

    def compensate(name: str) -> Callable[[], Any]:
        return lambda: get_method(name).run(model, calibration, list(removed), settings)

    for name, seconds in (("linear", 40), ("auto", 60), ("learned", 120)):
        results.measure(f"compensate {name}", seconds, compensate(name))


def generation(results: Results, model: DecoderModel, new_tokens: int = 64) -> None:
    for batch in (1, 16):
        prompt = torch.randint(3, 1000, (batch, 64), device=DEVICE)
        taken = results.measure(
            f"{new_tokens} new tokens, batch {batch}", 20, lambda p=prompt: greedy(model, p, new_tokens)
        )
        if taken is not None:
            results.add(f"generation, batch {batch}", batch * new_tokens / taken, "tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--folder", type=Path, help="Where to write, and to find what was written; default: temporary.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = Results(options.minutes)
    heads = max(options.hidden // 128, 2)
    shape = Shape(
        options.layers, options.hidden, options.hidden * 7 // 2, options.vocabulary, heads, max(heads // 4, 1)
    )
    ids = torch.randint(3, options.vocabulary, (options.samples, options.seq_len))
    calibration = CalibrationSet(ids, torch.ones_like(ids, dtype=torch.bool), "random", 0, "random", False)
    recipe = Recipe(samples=options.samples, seq_len=options.seq_len, batch_size=options.batch_size, trial_samples=4)
    results.add("machine", describe())
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "config.json").exists():
            results.measure("write the model", 0, lambda: write_llama(folder, shape, torch.bfloat16, DEVICE))
        source = find_source(str(folder))
        plan = predict_memory(AutoConfig.from_pretrained(folder), recipe)
        models: dict[str, DecoderModel] = {}
        results.measure(
            "load it", 0, lambda: models.update(resident=load_model(source), streamed=load_streamed(source))
        )
        rate = products_a_second(min(8192, 2 * options.hidden))
        embeddings = models["resident"].model.get_input_embeddings().weight.numel()
        floor = 2 * 2 * (models["resident"].num_parameters - embeddings) * ids.numel() / rate
        results.add("one matrix product", rate / 1e12, "TFLOP/s")
        results.add("floor of an analysis", floor, "s")
        compare(results, models, calibration, recipe, options.pairs)
        memory(results, models, calibration, recipe, plan)
        generation(results, models["resident"])
        removals(results, models["resident"], calibration, recipe)
    if options.json:
        options.json.write_text(json.dumps(results.rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
