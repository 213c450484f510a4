"""Wall time of the search over that of the greedy criteria, on the same trial sequences, and what either finds.

The search's own forward pass and what it holds out count. Protected ends as in Shortened LLaMA's "+"; the divergence from the
whole model is on the trial sequences, so it favours who looked at all of them.

    python benchmarks/search.py [--samples 4] [--seq-len 256] [--removals 6 9] [--pairs 2]
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
from sglp_llm.criteria import SetCriterion, make_criterion
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.opened import OpenedModel
from sglp_llm.trials import Trials
from sglp_llm.trials.measures import KLMeasure

PROTECTED = (4, 2)


def choice(name: str, model: DecoderModel, text: CalibrationSet, removals: int) -> tuple[float, frozenset[int]]:
    start = time.perf_counter()
    criterion = make_criterion(name, model.num_layers)
    assert isinstance(criterion, SetCriterion)
    criterion.on_trials(Trials(model, text))
    chosen = criterion.choose(removals, range(PROTECTED[0], model.num_layers - PROTECTED[1]))
    return time.perf_counter() - start, frozenset(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--removals", type=int, nargs="+", default=[6, 9])
    parser.add_argument("--pairs", type=int, default=2)
    options = parser.parse_args()
    opened = OpenedModel(str(fetch()), dtype="float32")
    text = calibration_set(opened.tokenizer, "pydoc", samples=options.samples, seq_len=options.seq_len)
    model = opened.load()
    print(f"{describe()}; {options.samples} x {options.seq_len} tokens")
    Trials(model, text.first(1)).run([frozenset({5})], KLMeasure())  # warm-up
    for removals in options.removals:
        ratios = []
        for _ in range(options.pairs):
            seconds, chosen = zip(*(choice(name, model, text, removals) for name in ("search", "sleb")), strict=True)
            ratios.append(seconds[0] / seconds[1])
            print(f"  search {seconds[0]:.1f} s, sleb {seconds[1]:.1f} s, ratio {ratios[-1]:.3f}", flush=True)
        measure = KLMeasure()
        Trials(model, text).run(set(chosen), measure)
        for name, each in zip(("search", "sleb"), chosen, strict=True):
            print(f"  {name}: {' '.join(map(str, sorted(each)))}, divergence {measure.means()[each]:.4f}")
        print(f"{removals} layers: median {median(ratios):.3f}, {min(ratios):.3f}..{max(ratios):.3f} (target 0.2)")


if __name__ == "__main__":
    main()
