"""Wall time of the analysis over that of plain transformers forward + backward on the same sequences.

The analysis computes CKA and GradNorm together. Both run on SmolLM2-135M in float32, alternating, in one process; the ratio is
the median over the pairs.

    python benchmarks/analysis.py [--samples 8] [--seq-len 512] [--pairs 5]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from fetch_smollm2 import fetch
from machine import describe

from sglp_llm.calibration import CalibrationSet, calibration_set
from sglp_llm.criteria import get_criterion
from sglp_llm.engine import run_pass
from sglp_llm.engine.representations import CKAObserver
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.opened import OpenedModel


def plain_seconds(model: DecoderModel, calibration: CalibrationSet) -> float:
    """One sequence per step, every weight requiring its gradient, as a user of transformers would write it."""
    start = time.perf_counter()
    for ids in calibration.input_ids:
        model.model(input_ids=ids[None], labels=ids[None], use_cache=False).loss.backward()
        model.model.zero_grad()
    return time.perf_counter() - start


def analysis_seconds(model: DecoderModel, calibration: CalibrationSet) -> float:
    """The pass that `sglp` needs, and the computation of scores and CKA from it."""
    start = time.perf_counter()
    gradnorm, cka = get_criterion("gradnorm")(model.num_layers), CKAObserver(model.num_layers)
    run_pass(model, calibration, [gradnorm, cka])
    gradnorm.scores()
    cka.result()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    opened = OpenedModel(str(fetch()), dtype="float32")
    calibration = calibration_set(opened.tokenizer, "pydoc", samples=options.samples, seq_len=options.seq_len)
    model = opened.load()
    print(f"{describe()}; {options.samples} x {options.seq_len} tokens, {options.pairs} pairs after one warm-up pair")
    ratios = []
    for pair in range(options.pairs + 1):
        plain, analysis = plain_seconds(model, calibration), analysis_seconds(model, calibration)
        if pair > 0:
            ratios.append(analysis / plain)
            print(f"pair {pair}: plain {plain:.2f} s, analysis {analysis:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(
        f"analysis / (forward + backward): median {median(ratios):.3f}, {min(ratios):.3f}..{max(ratios):.3f} (target 1.10)"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
