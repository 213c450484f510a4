"""Prunes, exports and reloads tiny models of all families over and over in one process, and watches memory and open files.

    python benchmarks/soak.py --cycles 300

Every cycle draws a family and a configuration of it, weights, a file format, an engine, a criterion, a compensation and a number
of layers; writes the model, prunes it, loads the result with plain transformers, and compares its logits with those of the source
with the layers skipped and the plan's tensors in place: they must be equal. A combination that is refused in one line is drawn
anew, and may have written nothing. At the end a line is fitted to the resident memory over the second half of the cycles. Exit
code 1 where an export differs, memory grows, or there are more open files at the end than after the first cycle.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
from calibration_sets import plain_set  # noqa: E402
from helpers import tiny_tokenizer  # noqa: E402
from tiny_models import Tiny, every_tiny, load_plain, logits_of, shortened_logits  # noqa: E402

from sglp_llm import PrunePlan, prune  # noqa: E402
from sglp_llm.errors import UserError  # noqa: E402
from sglp_llm.models.heap import trim  # noqa: E402

FORMATS = ("safetensors", "safetensors", "bin")
ENGINES = ("resident", "streamed")
CRITERIA = ("random", "magnitude", "bi", "gradnorm", "sglp", "ppl", "angular", "search")
COMPENSATIONS = ("none", "linear", "scale", "refit", "learned", "auto")
SEQUENCES = 8

NOISE = 8 * 1024
"""Bytes a cycle: memory that grows by less is flat, whatever the standard error of its slope."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    draw = random.Random(arguments.seed)
    drawn: Counter[str] = Counter()
    memory, files, refused, different, compensated, start = [], [], 0, [], 0, time.perf_counter()
    while len(memory) < arguments.cycles:
        with tempfile.TemporaryDirectory() as folder:
            what, plan, same = cycle(Path(folder), draw)
        if plan is None:
            refused += 1
            continue
        compensated += bool(plan.replaced)
        drawn.update(what)
        if not same:
            different.append(what)
        gc.collect()
        trim()
        memory.append(resident_bytes())
        files.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208
        if len(memory) % 20 == 0:
            print(f"{len(memory):4} cycles, {memory[-1] / 2**20:.1f} MB, {files[-1]} files", flush=True)
    slope, error = trend(memory[len(memory) // 2 :])
    grows = slope > max(NOISE, 2 * error)
    print(f"cycles {len(memory)}, refused {refused}, with replaced tensors {compensated}, different {len(different)}")
    print(f"drawn {dict(sorted(drawn.items()))}")
    print(f"memory {memory[0] / 2**20:.1f} MB after the first, {memory[-1] / 2**20:.1f} MB after the last cycle")
    print(f"slope of the second half {slope / 1024:+.2f} ± {error / 1024:.2f} kB a cycle{': GROWS' if grows else ''}")
    print(f"open files {files[0]} after the first, {files[-1]} after the last cycle, {max(files)} at most")
    print(f"{time.perf_counter() - start:.0f} s")
    for what in different:
        print(f"DIFFERENT {what}")
    sys.exit(bool(different) or grows or files[-1] > files[0])


def cycle(folder: Path, draw: random.Random) -> tuple[tuple[str, ...], PrunePlan | None, bool]:
    """One model from its random weights to the comparison; no plan where the combination is refused."""
    tiny = draw.choice(every_tiny())
    form, engine = draw.choice(FORMATS), draw.choice(ENGINES)
    criterion, compensation = draw.choice(CRITERIA), draw.choice(COMPENSATIONS)
    what = (tiny.family, form, engine, criterion, f"compensate {compensation}")
    model = save(drawn_model(tiny, draw), folder / "source", form)
    output = folder / "out"
    try:
        report = prune(
            folder / "source",
            output,
            calibration=plain_set(SEQUENCES),
            engine=engine,
            criterion=criterion,
            compensate=compensation,
            drop=draw.randint(1, max(1, model.config.num_hidden_layers // 2)),
            seed=draw.randrange(100),
            held_out=0.25,
        )
    except UserError as reason:
        assert not list(folder.glob(".*")), what
        assert not output.exists(), what
        print(f"refused: {' '.join(what)}: {str(reason).replace(str(folder), '')[:120]}", flush=True)
        return what, None, False
    found = logits_of(load_plain(output))
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, value in report.plan.replaced.items():
            parameters[name].copy_(value)
    expected = shortened_logits(model, tiny.adapter.layers, report.plan.removed)
    shutil.rmtree(output)
    return what, report.plan, torch.equal(found, expected)


def drawn_model(tiny: Tiny, draw: random.Random) -> PreTrainedModel:
    """A model of the family with random weights, in which every layer matters; of another depth where its settings allow that."""
    settings = dict(tiny.settings)
    if not any(isinstance(value, list) for value in settings.values()):
        settings[tiny.adapter.depth_key] = draw.randint(3, 8)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(tiny.family, **settings))
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.ndim >= 2 else parameter + 0.1 * noise)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, form: str) -> PreTrainedModel:
    """Writes the model with a tokenizer, and returns it."""
    if form == "safetensors":
        model.save_pretrained(folder)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    tiny_tokenizer().save_pretrained(folder)
    return model


def resident_bytes() -> int:
    """The resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def trend(values: list[int]) -> tuple[float, float]:
    """The slope of the least-squares line, in units a step, and its standard error."""
    steps = torch.arange(len(values), dtype=torch.float64)
    numbers = torch.tensor(values, dtype=torch.float64)
    steps, numbers = steps - steps.mean(), numbers - numbers.mean()
    slope = (steps @ numbers) / (steps @ steps)
    rest = numbers - slope * steps
    error = (rest @ rest / max(1, len(values) - 2) / (steps @ steps)).sqrt()
    return float(slope), float(error)


if __name__ == "__main__":
    main()
