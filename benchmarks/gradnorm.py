"""Time of GradNorm over that of plain transformers forward + backward on the same sequences, one sequence a step.

The baseline takes a gradient for every weight and keeps the buffers (``zero_grad(set_to_none=False)``), as a loop over a
calibration set does when it is written to be fast. Float32; the two alternate in one process; the ratio is the median over the
pairs.

    python benchmarks/gradnorm.py [--model wide|smollm2] [--tokens 512 ...] [--pairs 5] [--norms auto] [--cpu-time]
    python benchmarks/gradnorm.py --batched [--model wide] [--tokens 64 512] [--samples 8] [--cpu-time]
    python benchmarks/gradnorm.py --table [--cpu-time]

``wide`` is a random Llama of width 2048, MLP 5632 and 8 layers. ``--table`` shows where ghost norms stop paying: time of the
Grams over that of the gradient formed in pieces, for a group of linears with a common input, and what ``auto`` takes.
``--batched`` compares steps of all sequences with steps of one, and their numbers. ``--cpu-time`` counts the CPU time of one
thread, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import cast

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from fetch_smollm2 import fetch
from machine import describe
from transformers import AutoModelForCausalLM, LlamaConfig

from sglp_llm.calibration import CalibrationSet
from sglp_llm.criteria import get_criterion
from sglp_llm.engine import PassSettings, gradients, run_pass
from sglp_llm.engine.norms.ghost import Norms, linear_squared_norm
from sglp_llm.models.loading import DecoderModel, wrap_model
from sglp_llm.models.opened import OpenedModel

TARGETS = {"wide": 0.72, "smollm2": 1.0}
Clock = Callable[[], float]


def load(name: str) -> DecoderModel:
    if name == "smollm2":
        return OpenedModel(str(fetch()), dtype="float32").load()
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    return wrap_model(AutoModelForCausalLM.from_config(config).eval())


def random_tokens(model: DecoderModel, sequences: int, tokens: int) -> CalibrationSet:
    """Random token ids: time does not depend on them."""
    ids = torch.randint(3, model.model.config.vocab_size, (sequences, tokens))
    return CalibrationSet(ids, torch.ones_like(ids, dtype=torch.bool), "random", 0, "random", False)


def plain_seconds(model: DecoderModel, calibration: CalibrationSet, clock: Clock) -> float:
    start = clock()
    for ids in calibration.input_ids:
        model.model.zero_grad(set_to_none=False)
        model.model(input_ids=ids[None], labels=ids[None], use_cache=False).loss.backward()
    return clock() - start


def gradnorm_seconds(model: DecoderModel, calibration: CalibrationSet, norms: Norms, clock: Clock) -> float:
    start = clock()
    gradnorm = get_criterion("gradnorm")(model.num_layers)
    run_pass(model, calibration, [gradnorm], PassSettings(norms=norms))
    gradnorm.scores()
    return clock() - start


def compare(name: str, tokens: int, options: argparse.Namespace, clock: Clock) -> None:
    model = load(name)
    calibration = random_tokens(model, options.samples, tokens)
    print(f"{name}: {options.samples} x {tokens} tokens, {options.pairs} pairs after one warm-up pair", flush=True)
    ratios = []
    for pair in range(options.pairs + 1):
        plain = plain_seconds(model, calibration, clock)
        gradnorm = gradnorm_seconds(model, calibration, options.norms, clock)
        if pair > 0:
            ratios.append(gradnorm / plain)
            print(f"pair {pair}: plain {plain:.2f} s, gradnorm {gradnorm:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(
        f"gradnorm ({options.norms}) / (forward + backward), {name}, {tokens} tokens: median {median(ratios):.3f}, "
        f"{min(ratios):.3f}..{max(ratios):.3f} (target {TARGETS[name]:.2f})"
    )


def batched(name: str, tokens: int, options: argparse.Namespace, clock: Clock) -> None:
    """Steps of all sequences at once, whatever their tokens, over steps of one."""
    gradients.STEP_TOKENS["cpu"] = options.samples * tokens
    model = load(name)
    calibration = random_tokens(model, options.samples, tokens)
    ratios, apart = [], 0.0
    for pair in range(options.pairs + 1):
        seconds, scores = [], []
        for size in (options.samples, 1):
            start = clock()
            criterion = get_criterion("gradnorm")(model.num_layers)
            run_pass(model, calibration, [criterion], PassSettings(size, norms=options.norms))
            scores.append(criterion.scores())
            seconds.append(clock() - start)
        apart = max([apart, *(abs(one / other - 1) for one, other in zip(*scores, strict=True))])
        if pair > 0:
            ratios.append(seconds[0] / seconds[1])
            print(f"pair {pair}: at once {seconds[0]:.2f} s, one by one {seconds[1]:.2f} s", flush=True)
    print(
        f"gradnorm, {name}, {options.samples} x {tokens} tokens: at once / one by one: median {median(ratios):.3f}, "
        f"{min(ratios):.3f}..{max(ratios):.3f}; scores differ by at most {apart:.1e}"
    )


def table(repeats: int, clock: Clock) -> None:
    print("group of linears        tokens  ghost / direct   auto / the better of them")
    for width in (576, 1024, 2048, 4096):
        for linears in (1, 3):
            for tokens in (128, 256, 512, 1024, 2048):
                inputs = torch.randn(tokens, width)
                gradients = [torch.randn(tokens, width) for _ in range(linears)]
                seconds: dict[str, list[float]] = {"ghost": [], "direct": [], "auto": []}
                for repeat in range(repeats + 1):
                    for norms, times in seconds.items():
                        start = clock()
                        linear_squared_norm(inputs, gradients, cast("Norms", norms))
                        if repeat > 0:
                            times.append(clock() - start)
                ghost, direct, auto = (min(times) for times in seconds.values())
                print(
                    f"{linears} of {width:4} x {width:4}  {tokens:12}  {ghost / direct:14.2f}  "
                    f"{auto / min(ghost, direct):12.2f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(TARGETS), action="append")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--norms", choices=["auto", "ghost", "direct", "autograd"], default="auto")
    parser.add_argument("--batched", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(describe() + (", CPU time" if options.cpu_time else ""))
    if options.table:
        table(options.pairs, clock)
        return
    for name in options.model or TARGETS:
        for tokens in options.tokens:
            (batched if options.batched else compare)(name, tokens, options, clock)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
