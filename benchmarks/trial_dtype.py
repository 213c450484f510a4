"""Processor time of the search and of a linear fold with trials in bfloat16, over that in float32, and what either finds.

python benchmarks/trial_dtype.py [--samples 8] [--trial-samples 4] [--seq-len 256] [--drop 6] [--pairs 2]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from fetch_smollm2 import fetch
from machine import describe

from sglp_llm.calibration import CalibrationSet, calibration_set
from sglp_llm.compensation import FitSettings, get_method
from sglp_llm.criteria import SetCriterion, make_criterion
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.opened import OpenedModel
from sglp_llm.trials import Trials
from sglp_llm.trials.measures import KLMeasure

PROTECTED = (4, 2)


def searched(model: DecoderModel, text: CalibrationSet, drop: int, bfloat16: bool) -> tuple[float, tuple[int, ...]]:
    start = time.process_time()
    criterion = make_criterion("search", model.num_layers)
    assert isinstance(criterion, SetCriterion)
    criterion.on_trials(Trials(model, text, bfloat16=bfloat16))
    chosen = criterion.choose(drop, range(PROTECTED[0], model.num_layers - PROTECTED[1]))
    return time.process_time() - start, tuple(sorted(chosen))


def folded(
    model: DecoderModel, text: CalibrationSet, removed: tuple[int, ...], bfloat16: bool
) -> tuple[float, list[bool], float]:
    start = time.process_time()
    report = get_method("linear").run(model, text, removed, FitSettings(bfloat16=bfloat16)).report
    seconds = time.process_time() - start
    return seconds, [cut["taken"] for cut in report["cuts"]], report["losses"]["held_out"]["with"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--trial-samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--drop", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=2)
    options = parser.parse_args()
    opened = OpenedModel(str(fetch()), dtype="float32")
    text = calibration_set(opened.tokenizer, "pydoc", samples=options.samples, seq_len=options.seq_len)
    trials = text.first(options.trial_samples)
    model = opened.load()
    print(f"{describe()}; {options.samples} and {options.trial_samples} x {options.seq_len} tokens, processor time")
    Trials(model, text.first(1)).run([frozenset({5})], KLMeasure())  # warm-up
    ratios: dict[str, list[float]] = {"search": [], "linear fold": []}
    for _ in range(options.pairs):
        (slow, exact), (fast, rounded) = (searched(model, trials, options.drop, each) for each in (False, True))
        ratios["search"].append(fast / slow)
        print(f"  search: {slow:.1f} s {exact}, bfloat16 {fast:.1f} s {rounded}", flush=True)
        (slow, taken, loss), (fast, rounded_taken, rounded_loss) = (
            folded(model, text, exact, each) for each in (False, True)
        )
        ratios["linear fold"].append(fast / slow)
        print(
            f"  linear fold: {slow:.1f} s {taken} {loss:.4f}, bfloat16 {fast:.1f} s {rounded_taken} {rounded_loss:.4f}"
        )
    for name, found in ratios.items():
        print(f"{name}: median {median(found):.3f}, {min(found):.3f}..{max(found):.3f}")


if __name__ == "__main__":
    main()
