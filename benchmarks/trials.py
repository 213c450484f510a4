"""Wall time of trials that share prefixes over the naive loop, which runs the whole shortened model for every layer.

`ppl` over all layers of SmolLM2-135M (a large head: the floor is 0.675) and of a random Llama with a small head; `sleb` for some
removals, against the naive greedy. Both give the same scores, which is checked; they alternate in one process.

    python benchmarks/trials.py [ppl|sleb] [--samples 2] [--seq-len 512] [--pairs 5] [--removals 6]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from fetch_smollm2 import fetch
from machine import describe

from sglp_llm.calibration import CalibrationSet, calibration_set
from sglp_llm.criteria import GreedyCriterion, ScoreCriterion, make_criterion
from sglp_llm.models.loading import DecoderModel, wrap_model
from sglp_llm.models.opened import OpenedModel
from sglp_llm.trials import Trials

Timed = tuple[float, list[float]]


@torch.inference_mode()
def naive_loss(model: DecoderModel, calibration: CalibrationSet, removed: tuple[int, ...]) -> float:
    """Removes the layers and runs the whole shortened model, as a simple script would."""
    decoder = model.model.model
    layers = decoder.layers
    decoder.layers = nn.ModuleList(layer for index, layer in enumerate(layers) if index not in removed)
    model.model.config.num_hidden_layers = len(decoder.layers)
    losses = [
        float(model.model(input_ids=ids[None], labels=ids[None], use_cache=False).loss) for ids in calibration.input_ids
    ]
    decoder.layers = layers
    model.model.config.num_hidden_layers = len(layers)
    return sum(losses) / len(losses)


def naive_ppl(model: DecoderModel, calibration: CalibrationSet) -> Timed:
    start = time.perf_counter()
    scores = [math.exp(naive_loss(model, calibration, (layer,))) for layer in range(model.num_layers)]
    return time.perf_counter() - start, scores


def shared_ppl(model: DecoderModel, calibration: CalibrationSet) -> Timed:
    start = time.perf_counter()
    criterion = make_criterion("ppl", model.num_layers)
    assert isinstance(criterion, ScoreCriterion)
    criterion.on_trials(Trials(model, calibration))
    return time.perf_counter() - start, criterion.scores()


def naive_sleb(model: DecoderModel, calibration: CalibrationSet, removals: int) -> Timed:
    start = time.perf_counter()
    order: list[int] = []
    for _ in range(removals):
        left = [layer for layer in range(model.num_layers) if layer not in order]
        order.append(min(left, key=lambda layer: naive_loss(model, calibration, (*order, layer))))
    return time.perf_counter() - start, list(map(float, order))


def shared_sleb(model: DecoderModel, calibration: CalibrationSet, removals: int) -> Timed:
    start = time.perf_counter()
    criterion = make_criterion("sleb", model.num_layers)
    assert isinstance(criterion, GreedyCriterion)
    criterion.on_trials(Trials(model, calibration))
    order = criterion.choose(removals, range(model.num_layers))
    return time.perf_counter() - start, list(map(float, order))


def report(what: str, naive: Callable[[], Timed], shared: Callable[[], Timed], pairs: int, target: str) -> None:
    """Alternates the two and prints the median ratio."""
    ratios = []
    for _ in range(pairs):
        (slow, expected), (fast, found) = naive(), shared()
        worst = max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(found, expected, strict=True))
        assert worst < 1e-5, f"{what}: scores differ by {worst}"
        ratios.append(fast / slow)
        print(f"  naive {slow:.1f} s, shared prefixes {fast:.1f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(f"{what}: median {median(ratios):.3f}, {min(ratios):.3f}..{max(ratios):.3f} ({target})")


def small_head() -> DecoderModel:
    """A random Llama in which the head costs less than a layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return wrap_model(LlamaForCausalLM(config).eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("criterion", nargs="?", choices=("ppl", "sleb"), help="default: both")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--removals", type=int, default=6)
    options = parser.parse_args()
    opened = OpenedModel(str(fetch()), dtype="float32")
    text = calibration_set(opened.tokenizer, "pydoc", samples=options.samples, seq_len=options.seq_len)
    model, small = opened.load(), small_head()
    ids = text.input_ids % 1024
    noise = CalibrationSet(ids, text.mask, "random", 0, "", False)
    print(f"{describe()}; {options.samples} x {options.seq_len} tokens, sleb on 1 x {options.seq_len}")
    for name, wrapped, ids, target in (
        ("SmolLM2-135M", model, text, "target 0.72, floor of ppl 0.675"),
        ("random Llama with a small head", small, noise, "target 0.56, floor of ppl 0.543"),
    ):
        compare(name, wrapped, ids, options, target)


def compare(name: str, model: DecoderModel, text: CalibrationSet, options: argparse.Namespace, target: str) -> None:
    """The requested criteria on one model."""
    one = text.first(1)
    naive_loss(model, one, ())  # warm-up
    if options.criterion != "sleb":
        report(f"ppl, {name}", lambda: naive_ppl(model, text), lambda: shared_ppl(model, text), options.pairs, target)
    if options.criterion != "ppl":
        report(
            f"sleb, {options.removals} layers, {name}",
            lambda: naive_sleb(model, one, options.removals),
            lambda: shared_sleb(model, one, options.removals),
            1,
            target,
        )


if __name__ == "__main__":
    main()
