"""An analysis of an 8B-shaped random Llama in bfloat16 on one GPU: time over the floor, peak device memory, and the ratios of the
two engines to each other and to plain transformers.

The floor is what the matrix products of forward and backward pass need, 2 x parameters x tokens multiply-adds (no weight
gradients), at the rate that one large product reaches on the same GPU. Without a GPU it runs on the CPU, which is for trying it.

    python benchmarks/gpu.py [--samples 8] [--seq-len 2048] [--pairs 3] [--layers 32] [--hidden 4096] [--folder WHERE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from machine import describe
from random_llama import Shape, write_llama

from sglp_llm.calibration import CalibrationSet
from sglp_llm.criteria import make_criterion
from sglp_llm.engine import run_pass
from sglp_llm.engine.representations import CKAObserver
from sglp_llm.models import find_source
from sglp_llm.models.loading import DecoderModel, load_model, load_streamed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GB = 1e9


def synchronized() -> float:
    """The time, after all kernels that were launched have finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak() -> float:
    """Peak device memory since the last call, in GB; 0 without a GPU."""
    if DEVICE.type != "cuda":
        return 0.0
    found = torch.cuda.max_memory_allocated() / GB
    torch.cuda.reset_peak_memory_stats()
    return found


def products_a_second(size: int) -> float:
    """FLOPs a second of one bfloat16 matrix product, the best of ten."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = synchronized()
        a @ b
        best = min(best, synchronized() - start)
    return 2 * size**3 / best


def analysis_seconds(model: DecoderModel, calibration: CalibrationSet, criterion: str) -> float:
    """CKA and one gradient criterion."""
    start = synchronized()
    observer, cka = make_criterion(criterion, model.num_layers), CKAObserver(model.num_layers)
    run_pass(model, calibration, [observer, cka])
    observer.scores()
    cka.result()
    return synchronized() - start


def plain_seconds(model: DecoderModel, calibration: CalibrationSet) -> float:
    """One sequence per step, every weight requiring its gradient, gradient buffers kept."""
    start = synchronized()
    for ids in calibration.input_ids.to(DEVICE):
        model.model.zero_grad(set_to_none=False)
        model.model(input_ids=ids[None], labels=ids[None], use_cache=False).loss.backward()
    seconds = synchronized() - start
    model.model.zero_grad(set_to_none=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="Where to write; default: the system's temporary folder.")
    options = parser.parse_args()
    heads = options.hidden // 128
    shape = Shape(options.layers, options.hidden, options.hidden * 7 // 2, 128256, heads, max(heads // 4, 1))
    ids = torch.randint(3, 128256, (options.samples, options.seq_len))
    calibration = CalibrationSet(ids, torch.ones_like(ids, dtype=torch.bool), "random", 0, "random", False)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        total = write_llama(Path(name), shape, torch.bfloat16)
        source = find_source(name)
        resident, streamed = load_model(source), load_streamed(source)
        rate = products_a_second(min(8192, 2 * options.hidden))
        embeddings = resident.model.get_input_embeddings().weight.numel()
        floor = 2 * 2 * (resident.num_parameters - embeddings) * ids.numel() / rate
        print(f"{describe()}; {total / GB:.1f} GB bfloat16, {options.samples} x {options.seq_len} tokens")
        print(f"one matrix product: {rate / 1e12:.1f} TFLOP/s; floor of an analysis {floor:.2f} s", flush=True)
        ratios: dict[str, list[float]] = {}
        for pair in range(options.pairs + 1):
            seconds, memory = {}, {}
            peak()
            for criterion in ("gradnorm", "taylor"):
                for engine, model in (("resident", resident), ("streamed", streamed)):
                    seconds[engine, criterion] = analysis_seconds(model, calibration, criterion)
                    memory[engine, criterion] = peak()
            plain = plain_seconds(resident, calibration)
            if pair == 0:
                continue
            found = {
                "resident gradnorm / floor": seconds["resident", "gradnorm"] / floor,
                "resident gradnorm / plain transformers": seconds["resident", "gradnorm"] / plain,
                "streamed / resident, gradnorm": seconds["streamed", "gradnorm"] / seconds["resident", "gradnorm"],
                "streamed / resident, taylor": seconds["streamed", "taylor"] / seconds["resident", "taylor"],
                "streamed gradnorm / plain transformers": seconds["streamed", "gradnorm"] / plain,
            }
            for what, ratio in found.items():
                ratios.setdefault(what, []).append(ratio)
            times = ", ".join(f"{engine} {name} {value:.2f} s" for (engine, name), value in seconds.items())
            print(f"pair {pair}: plain {plain:.2f} s, {times}", flush=True)
        for what, values in ratios.items():
            print(f"{what}: median {median(values):.3f}, {min(values):.3f}..{max(values):.3f}")
        if DEVICE.type != "cuda":
            return
        # The resident model is on the device all the time, so its weights are subtracted from the streamed engine's peak.
        weights = sum(parameter.nbytes for parameter in resident.model.parameters()) / GB
        for (engine, criterion), value in memory.items():
            own = value if engine == "resident" else value - weights
            print(f"peak device memory, {engine}, {criterion}: {own:.1f} GB")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
