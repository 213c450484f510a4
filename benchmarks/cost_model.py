"""FLOPs and bytes read of an analysis (CKA and GradNorm) by the cost model of docs/performance.md, for the shapes in `shapes/`;
then the seconds of whole runs on named GPUs, as ``sglp-llm plan-memory --on GPU`` predicts them, and what most of each goes to.

    python benchmarks/cost_model.py [--tflops 400] [--gigabytes 2]

``--tflops`` is the rate of one large matrix product and ``--gigabytes`` what a disk reads a second: assumptions, for the seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from sglp_llm.memory.duration import accelerator, predict_durations
from sglp_llm.memory.prediction import work_of
from sglp_llm.plan import Recipe, preset_settings

SHAPES = Path(__file__).parent / "shapes"
SETS = ((32, 512), (128, 2048))
GHOST_PENALTY = 1.15  # as the automatic choice weighs it


def flops(config: dict[str, Any], sequences: int, tokens: int) -> tuple[float, float, float, float]:
    """FLOPs of the resident engine, the streamed one and plain transformers; and the bytes that the streamed one reads."""
    layers, hidden, wide = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * wide
    count = sequences * tokens
    body, head = 2 * layers * layer * count, 2 * config["vocab_size"] * hidden * count
    attention = 2 * layers * hidden * tokens * count  # both products, half of them masked
    norms = 0.0
    for width_in, widths_out in (
        (hidden, [hidden, keys, keys]),
        (hidden, [hidden]),
        (hidden, [wide, wide]),
        (wide, [hidden]),
    ):
        grams = GHOST_PENALTY * tokens * tokens / 2 * (width_in + sum(widths_out))
        norms += 2 * min(grams, tokens * width_in * sum(widths_out)) * layers * sequences
    resident = 2 * (body + head) + 3 * attention + norms
    streamed = resident + body + attention  # each layer's forward once more
    plain = 3 * (body + head) + 3 * attention
    return resident, streamed, plain, 2 * 2 * layer * layers  # bfloat16, once forward and once backward


RUNS = {
    "analysis": Recipe(criterion="sglp", ratio=0.25, samples=32, seq_len=512),
    "analysis + linear": Recipe(criterion="sglp", ratio=0.25, samples=32, seq_len=512, compensate="linear"),
    "analysis + learned": Recipe(criterion="sglp", ratio=0.25, samples=64, seq_len=512, compensate="learned"),
    "best": Recipe(**preset_settings("best"), ratio=0.25, samples=32, seq_len=512),
}


def whole_runs(gigabytes: float) -> None:
    print("\n| model | run | GPU | resident | mostly | streamed | mostly |")
    print("|---|---|---|---|---|---|---|")
    for name in ("8b", "70b"):
        config = AutoConfig.from_pretrained(SHAPES / f"llama-3.1-{name}")
        for title, recipe in RUNS.items():
            for gpu in ("rtx4090", "a100", "h100"):
                device = accelerator(gpu)
                both = predict_durations(config, torch.bfloat16, recipe, work_of(recipe), device, gigabytes * 1e9)
                cells = " | ".join(f"{each.seconds:.0f} s | {each.dominating}" for each in both)
                print(f"| {name.upper()} | {title} | {gpu} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=400.0)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    options = parser.parse_args()
    print(
        "| model | sequences | resident | streamed | streamed/resident | resident/plain | reads | resident, streamed, reading |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in ("8b", "70b", "405b"):
        config = json.loads((SHAPES / f"llama-3.1-{name}" / "config.json").read_text())
        for sequences, tokens in SETS:
            resident, streamed, plain, read = flops(config, sequences, tokens)
            seconds = [
                resident / options.tflops / 1e12,
                streamed / options.tflops / 1e12,
                read / options.gigabytes / 1e9,
            ]
            print(
                f"| {name.upper()} | {sequences} x {tokens} | {resident / 1e15:.2f} | {streamed / 1e15:.2f} | "
                f"{streamed / resident:.2f} | {resident / plain:.2f} | {read / 1e9:.0f} GB | "
                f"{', '.join(f'{value:.0f} s' for value in seconds)} |"
            )
    whole_runs(options.gigabytes)


if __name__ == "__main__":
    main()
