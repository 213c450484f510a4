"""The streamed engine over the resident one: peak memory, wall time, and the same plan.

A random float32 Llama of 4.23 GB is pruned by `sglp-llm prune` in a process of its own with each engine; the peak is that
process's (`ru_maxrss`, what `/usr/bin/time -v` prints). Then both engines and plain transformers (forward and backward, every
weight requiring its gradient) alternate in one process, the files in the page cache.

    python benchmarks/streamed.py [memory|time] [--samples 8] [--seq-len 128] [--pairs 3] [--folder WHERE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from machine import describe
from random_llama import Shape, write_llama

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from fetch_smollm2 import fetch

from sglp_llm.calibration import CalibrationSet, calibration_set
from sglp_llm.criteria import make_criterion
from sglp_llm.engine import run_pass
from sglp_llm.engine.representations import CKAObserver
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.opened import OpenedModel

SHAPE = Shape(24, 1536, 6144, 49152, 12, 12)
GB = 1e9


def peak_of(arguments: list[str]) -> tuple[float, float]:
    """Runs ``sglp-llm`` in a process of its own; returns its peak resident memory in GB, and its seconds."""
    start = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, "-m", "sglp_llm", *arguments], os.environ)
    _, status, usage = os.wait4(child, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"sglp-llm {' '.join(arguments)} failed")
    return usage.ru_maxrss * 1024 / GB, time.perf_counter() - start


def compare_memory(source: Path, folder: Path, samples: int, seq_len: int) -> None:
    """Runs the whole command with each engine, and prints peak memory and time."""
    removed = {}
    for engine, sequences in (("resident", samples), ("streamed", samples), ("streamed", 4 * samples)):
        output, scratch = folder / "pruned", folder / "scratch"
        scratch.mkdir()
        arguments = ["prune", str(source), "--drop", "6", "--output", str(output), "--preset", "paper"]
        arguments += [
            "--calibration",
            "pydoc",
            "--samples",
            str(sequences),
            "--seq-len",
            str(seq_len),
            "--no-verify",
            "--engine",
            engine,
        ]
        peak, seconds = peak_of([*arguments, *(["--scratch", str(scratch)] if engine == "streamed" else [])])
        plan = json.loads((output / "sglp_plan.json").read_text())
        if sequences == samples:
            removed[engine] = plan["removed"]
        print(
            f"{engine}, {sequences} sequences: peak {peak:.2f} GB, {seconds:.0f} s, removed {plan['removed']}",
            flush=True,
        )
        shutil.rmtree(output)
        scratch.rmdir()
    assert removed["resident"] == removed["streamed"], removed
    print("the plan is the same (targets: streamed at most 1.5 GB, resident more than 4 GB)")


def pass_seconds(model: DecoderModel, calibration: CalibrationSet, criterion: str) -> tuple[float, list[float]]:
    """CKA and one gradient criterion; seconds and scores."""
    start = time.perf_counter()
    observer, cka = make_criterion(criterion, model.num_layers), CKAObserver(model.num_layers)
    run_pass(model, calibration, [observer, cka])
    scores = observer.scores()
    cka.result()
    return time.perf_counter() - start, scores


def plain_seconds(model: DecoderModel, calibration: CalibrationSet) -> float:
    """One sequence per step, every weight requiring its gradient, as a user of transformers would write it."""
    start = time.perf_counter()
    for ids in calibration.input_ids:
        model.model(input_ids=ids[None], labels=ids[None], use_cache=False).loss.backward()
        model.model.zero_grad(set_to_none=False)
    return time.perf_counter() - start


def compare_time(source: Path, calibration: CalibrationSet, scratch: Path, pairs: int) -> None:
    """Both engines on the same sequences, with ghost norms and with whole gradients."""
    resident, opened = OpenedModel(str(source)).load(), OpenedModel(str(source))
    opened.stream(scratch)
    streamed = opened.load()
    ratios: dict[str, list[float]] = {}
    for pair in range(pairs + 1):
        seconds = {}
        for criterion in ("gradnorm", "taylor"):
            seconds[criterion], expected = pass_seconds(resident, calibration, criterion)
            slower, found = pass_seconds(streamed, calibration, criterion)
            worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
            assert worst < 1e-5, f"{criterion}: scores differ by {worst}"
            if pair > 0:
                ratios.setdefault(f"streamed / resident, {criterion}", []).append(slower / seconds[criterion])
            seconds[f"streamed {criterion}"] = slower
        plain = plain_seconds(resident, calibration)
        resident.model.zero_grad(set_to_none=True)
        if pair > 0:
            ratios.setdefault("streamed gradnorm / plain transformers", []).append(seconds["streamed gradnorm"] / plain)
        print(
            f"pair {pair}: plain {plain:.1f} s, "
            + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()),
            flush=True,
        )
    targets = {"gradnorm": "1.7, floor 1.43", "taylor": "1.5, floor 1.33", "transformers": "1.25"}
    for name, values in ratios.items():
        target = targets[name.split()[-1]]
        print(f"{name}: median {median(values):.3f}, {min(values):.3f}..{max(values):.3f} (target {target})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("memory", "time"), help="default: both")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Where to write; default: the system's temporary folder.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, scratch = Path(name) / "source", Path(name) / "time"
        source.mkdir()
        scratch.mkdir()
        total = write_llama(source, SHAPE)
        tokenizer = OpenedModel(str(fetch())).tokenizer
        tokenizer.save_pretrained(source)
        print(f"{describe()}; {total / GB:.2f} GB float32, {options.samples} x {options.seq_len} tokens")
        if options.part != "time":
            compare_memory(source, Path(name), options.samples, options.seq_len)
        if options.part != "memory":
            text = calibration_set(tokenizer, "pydoc", samples=options.samples, seq_len=options.seq_len)
            compare_time(source, text, scratch, options.pairs)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
