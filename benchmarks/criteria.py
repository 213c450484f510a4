"""Wall time of one analysis with gradnorm, taylor, bi, angular and CKA over the analysis with gradnorm alone.

Gradients by autograd in both, on SmolLM2-135M in float32; the two alternate in one process.

    python benchmarks/criteria.py [--samples 8] [--seq-len 512] [--pairs 3]
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

from sglp_llm.calibration import calibration_set
from sglp_llm.criteria import ScoreCriterion, SetCriterion, get_criterion
from sglp_llm.engine import PassSettings, run_pass
from sglp_llm.engine.representations import CKAObserver
from sglp_llm.models.opened import OpenedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    opened = OpenedModel(str(fetch()), dtype="float32")
    text = calibration_set(opened.tokenizer, "pydoc", samples=options.samples, seq_len=options.seq_len)
    model = opened.load()

    def seconds(*names: str, similarity: bool) -> float:
        start = time.perf_counter()
        criteria = [get_criterion(name)(model.num_layers) for name in names]
        cka = [CKAObserver(model.num_layers)] if similarity else []
        run_pass(model, text, [*criteria, *cka], PassSettings(norms="autograd"))
        for criterion in criteria:
            if isinstance(criterion, SetCriterion):
                criterion.choose(6, range(model.num_layers))
            elif isinstance(criterion, ScoreCriterion):
                criterion.scores()
        for observer in cka:
            observer.result()
        return time.perf_counter() - start

    print(f"{describe()}; {options.samples} x {options.seq_len} tokens, {options.pairs} pairs after one warm-up pair")
    ratios = []
    for pair in range(options.pairs + 1):
        alone = seconds("gradnorm", similarity=False)
        together = seconds("gradnorm", "taylor", "bi", "angular", similarity=True)
        if pair > 0:
            ratios.append(together / alone)
            print(f"pair {pair}: gradnorm {alone:.2f} s, all {together:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(
        f"all criteria / gradnorm alone: median {median(ratios):.3f}, {min(ratios):.3f}..{max(ratios):.3f} (target 1.25)"
    )


if __name__ == "__main__":
    main()
