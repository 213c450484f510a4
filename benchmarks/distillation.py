"""Where a step of distillation spends its time, and which settings bring a shortened model nearest to its original in that time.

    python benchmarks/distillation.py STUDENT TEXT [--tokens 20480] [--settings NAME ...] [--parts]

STUDENT is a folder that `sglp-llm prune` has written from SmolLM2-135M-Instruct, TEXT is `training.jsonl` of
`tools/calibration_texts.py`. Every setting begins with the same student and has sequences of 256 tokens. Time is processor
time of one thread without measurements; the divergence is measured on 24 held-out sequences. `behind` trains the decoder
layers behind the first cut and the final norm alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from fetch_smollm2 import fetch
from machine import describe

from sglp_llm.calibration import training_sequences
from sglp_llm.healing.loss import divergence, sampled_positions
from sglp_llm.healing.teacher import OnlineTeacher, logits_at
from sglp_llm.healing.trained import seams_of
from sglp_llm.healing.training import rate_factor
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import load_plan
from sglp_llm.plan.healing_recipe import HealingRecipe

HELD_OUT = 24
LENGTH = 256


@dataclass(frozen=True)
class Setting:
    """What is tried: as many tokens as with the defaults, times ``longer`` where a step is cheaper."""

    rate: float = 2e-4
    positions: float = 1.0
    sequences: int = 4
    warmup: int = 2
    behind: bool = False
    longer: float = 1.0


SETTINGS = {
    "default": Setting(),
    "positions 0.25": Setting(positions=0.25, longer=1.25),
    "rate 3e-4": Setting(rate=3e-4),
    "rate 5e-4": Setting(rate=5e-4, warmup=4),
    "2 sequences": Setting(sequences=2),
    "behind": Setting(behind=True, longer=1.45),
    "behind, rate 5e-4": Setting(rate=5e-4, warmup=3, behind=True, longer=1.45),
    "behind, rate 5e-4, 2 sequences": Setting(rate=5e-4, warmup=4, sequences=2, behind=True, longer=1.3),
}


class Study:
    def __init__(self, student: Path, text: Path) -> None:
        opened = OpenedModel(str(fetch()), dtype="float32")
        found = training_sequences(opened.tokenizer, f"jsonl:{text}:text", tokens=300 * LENGTH, seq_len=LENGTH, seed=0)
        order = found.positions.argsort(stable=True)
        self.held_out, self.text = found.input_ids[order[-HELD_OUT:]], found.input_ids[order[:-HELD_OUT]]
        self.teacher = OnlineTeacher(opened.load(), bfloat16=True)
        self.teacher.remember(range(HELD_OUT))
        self.folder, self.cut = student, min(seams_of(load_plan(student)))

    def student(self, behind: bool = False) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).train()
        if behind:
            model.requires_grad_(False)
            for part in (*model.model.layers[self.cut :], model.model.norm):
                part.requires_grad_(True)
        return model

    def measure(self, model: Any) -> float:
        """Mean divergence of the held-out sequences, in nats a token."""
        parts = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for numbers in torch.arange(HELD_OUT).split(8):
                ids = self.held_out[numbers]
                parts.append(float(divergence(logits_at(model, ids, None), self.teacher.targets(numbers, ids), ids)))
        return sum(parts) / len(parts)

    def run(self, setting: Setting, tokens: int) -> tuple[int, float, float]:
        """Steps, seconds, and the held-out divergence after them."""
        steps = round(setting.longer * tokens / (setting.sequences * LENGTH))
        recipe = HealingRecipe(warmup_steps=setting.warmup)
        model = self.student(setting.behind)
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        order = torch.randperm(len(self.text), generator=torch.Generator().manual_seed(0)).repeat(8)
        never = torch.full((setting.sequences,), HELD_OUT)  # not one of those that the teacher remembers
        seconds = 0.0
        for step in range(steps):
            ids = self.text[order[step * setting.sequences : (step + 1) * setting.sequences]]
            for group in optimizer.param_groups:
                group["lr"] = setting.rate * rate_factor(recipe, step, steps)
            start = time.process_time()
            positions = sampled_positions(LENGTH, setting.positions, step)
            targets = self.teacher.targets(never, ids, positions)
            with torch.autocast("cpu", torch.bfloat16):
                logits = logits_at(model, ids, positions)
            divergence(logits, targets, ids, positions=positions).backward()
            clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds += time.process_time() - start
        return steps, seconds, self.measure(model)

    def parts(self, repeats: int = 5) -> dict[str, float]:
        """Median seconds of every part of one step of four sequences."""
        model, teacher = self.student(), self.teacher.model.model
        slow, fused = (torch.optim.AdamW(model.parameters(), lr=1e-6, fused=each) for each in (False, True))
        ids, times = self.text[:4], defaultdict[str, list[float]](list)

        def timed(name: str, work: Callable[[], Any]) -> Any:
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16):
                found = work()
            times[name].append(time.process_time() - start)
            return found

        for _ in range(repeats):
            with torch.no_grad():
                states = timed("teacher's layers", lambda: teacher.base_model(input_ids=ids).last_hidden_state)
                targets: Tensor = timed("teacher's head", lambda kept=states: teacher.lm_head(kept))
            states = timed("student's layers", lambda: model.base_model(input_ids=ids).last_hidden_state)
            entering = states.detach().requires_grad_(True)
            logits = timed("student's head", lambda kept=entering: model.lm_head(kept))
            leaf = logits.detach().requires_grad_(True)
            loss = timed("loss and its gradient", lambda kept=leaf, other=targets: divergence(kept, other, ids))
            timed("the gradient handed on", loss.backward)
            timed("head backward", lambda kept=logits, slope=leaf: kept.backward(slope.grad))
            timed("layers backward", lambda kept=states, slope=entering: kept.backward(slope.grad))
            timed("clipping", lambda: clip_grad_norm_(model.parameters(), 1.0))
            timed("AdamW, not fused", slow.step)
            timed("AdamW", fused.step)
            model.zero_grad()
        return {name: median(found[1:]) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--parts", action="store_true", help="Time the parts of a step, too.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(options.student, options.text)
    print(f"{describe()}; held-out divergence before: {study.measure(study.student()):.4f}", flush=True)
    for name, seconds in study.parts().items() if options.parts else ():
        print(f"  {name}: {seconds:.2f} s")
    for name in options.settings:
        steps, seconds, after = study.run(SETTINGS[name], options.tokens)
        print(f"{name}: {steps} steps, {seconds:.0f} s, divergence {after:.4f}", flush=True)


if __name__ == "__main__":
    main()
