"""Writes docs/healing.md from what tools/healing.sh has measured: python tools/healing_page.py FOLDER PAGE."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from machine import describe

TEXTS = {"wikitext2": "WikiText-2", "c4": "C4", "alpaca": "Alpaca"}
DENSE = "dense"

HEAD = """# What training after a removal adds

SmolLM2-135M-Instruct without some of its 30 decoder layers, before and after `sglp-llm heal`. Made by `tools/healing.sh DATA`,
which says what is trained on and what is measured on: the two have no text in common.

- A name says what shortened the model and how many layers it lacks: `best-6` is `--preset best --drop 6`, `search+linear-6` is
  `--criterion search --compensate linear --drop 6`, `sglp-6` the paper's recipe without a repair.
- Columns named after a text are ln(perplexity / dense perplexity) on windows of 512 tokens. The standard error is that of the
  difference of two means as if the windows were not the same ones, and so too large.
- Perplexity and tasks are computed in bfloat16, which changes a mean by 0.001.
- Minutes are wall time of training on one thread, with another measurement on the other core.
- The text is WikiText-2 (train) and C4 in equal parts, in sequences of 256 tokens, four a step.
"""

PARAMETERS = """## Which parameters

`full` are all parameters, `partial` the layers around the cuts, the last ones and the head, `seam` the layers around the cuts,
`lora` adapters of rank 16 on all linears. `no-teacher` learns the next token of the text alone. `divergence` is the KL from the
original on held-out training text, nats a token, before and after; `tokens` are those until the weights that were kept. Without
a teacher a model also learns the style of its text, most of all that of WikiText-2, and may lose something else for it: the
columns then say how well the text is learned, rather than how near the model is to the original.
"""

LONG = """## With more time

All parameters, trained with `--minutes`. `tasks` is the average over the nine tasks of the suite `offline`, `generation` the
average exact match of the suite `generation_offline`, with 100 examples a task unless LIMIT says otherwise; `repetition` is that
suite's share of repeated 4-grams in free text, where less is better.
"""

BY_TEXT = """## Which text

`=TEXT` after the preset says what it was calibrated on, and after `full` what all parameters of `search+linear-6` were trained on
with 20k tokens: one kind of text alone, or what the original samples itself (`self`). A column whose text is the row's own says
how well that kind of text is learned; the others say what carries over. The removals are calibrated on {samples} sequences of 256
tokens.
"""


def main() -> None:
    folder, page = map(Path, sys.argv[1:3])
    sections = [
        HEAD,
        f"Machine: {describe()}.\n",
        PARAMETERS,
        _table(folder, "sample", ("wikitext2", "c4"), (), True),
        _order(folder),
        LONG,
        _table(folder, "whole", ("wikitext2", "c4"), ("offline", "generation_offline", "repetition"), True),
        BY_TEXT.format(samples=_samples(folder)),
        _table(folder, "texts", ("wikitext2", "c4", "alpaca"), ("offline",), False),
    ]
    page.write_text("\n".join(sections), encoding="utf-8")


def _table(folder: Path, kind: str, texts: Sequence[str], suites: Sequence[str], healing: bool) -> str:
    names = {file.name.removesuffix(f".{kind}.wikitext2.json") for file in folder.glob(f"*.{kind}.wikitext2.json")}
    titles = {"offline": "tasks", "generation_offline": "generation", "repetition": "repetition"}
    columns = [TEXTS[text] for text in texts] + [titles[suite] for suite in suites]
    columns += ["divergence", "tokens", "parameters", "minutes"] if healing else []
    lines = [f"| model | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in sorted(names, key=lambda each: (each != DENSE, _depth(each), each)):
        cells = [_gap(folder, name, kind, text) for text in texts] + [
            _score(folder, name, kind, suite) for suite in suites
        ]
        cells += _healing(folder / name) if healing else []
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    windows = {text: _read(folder, DENSE, kind, text)["windows"] for text in texts}
    said = " and ".join(f"{count} windows of {TEXTS[text]}" for text, count in windows.items())
    return "\n".join(lines) + f"\n\nMeasured on {said}.\n"


def _order(folder: Path) -> str:
    """Whether training changes which model is best, among those of one depth."""
    found: dict[int, dict[str, tuple[float, float]]] = {}
    for file in folder.glob("*+full.sample.wikitext2.json"):
        name = file.name.removesuffix("+full.sample.wikitext2.json")
        found.setdefault(_depth(name), {})[name] = (_mean(folder, name), _mean(folder, f"{name}+full"))
    lines = []
    for depth, models in sorted(item for item in found.items() if len(item[1]) > 1):
        before, after = (sorted(models, key=lambda name: models[name][place]) for place in (0, 1))
        orders = [
            ", ".join(f"`{name}` {models[name][place]:.2f}" for name in order)
            for place, order in ((0, before), (1, after))
        ]
        verdict = "stays" if before == after else "changes"
        lines.append(f"- Without {depth} layers the order {verdict}: before {orders[0]}; after {orders[1]}.")
    return (
        "Does training change which choice of layers is best? Mean of both texts, before and after `full`:\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _mean(folder: Path, name: str) -> float:
    gaps = [
        _read(folder, name, "sample", text)["mean_nll"] - _read(folder, DENSE, "sample", text)["mean_nll"]
        for text in ("wikitext2", "c4")
    ]
    return float(sum(gaps)) / len(gaps)


def _read(folder: Path, name: str, kind: str, what: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / f"{name}.{kind}.{what}.json").read_text(encoding="utf-8"))
    return data


def _depth(name: str) -> int:
    number = name.partition("+full")[0].partition("=")[0].rpartition("-")[2].partition("+")[0]
    return int(number) if number.isdigit() else 0


def _gap(folder: Path, name: str, kind: str, text: str) -> str:
    if not (folder / f"{name}.{kind}.{text}.json").exists():
        return ""
    own, whole = _read(folder, name, kind, text), _read(folder, DENSE, kind, text)
    if name == DENSE:
        return f"perplexity {own['perplexity']:.2f}"
    error = (own["nll_standard_error"] ** 2 + whole["nll_standard_error"] ** 2) ** 0.5
    return f"{own['mean_nll'] - whole['mean_nll']:.3f} ± {error:.3f}"


def _score(folder: Path, name: str, kind: str, suite: str) -> str:
    task, file = ("generation_open", "generation_offline") if suite == "repetition" else ("average", suite)
    if not (folder / f"{name}.{kind}.{file}.json").exists():
        return ""
    score = next(each for each in _read(folder, name, kind, file)["scores"] if each["task"] == task)
    return f"{score['value']:.3f} ± {score['stderr']:.3f}"


def _samples(folder: Path) -> int:
    """Calibration sequences of the removals that are calibrated on one kind of text."""
    plan = next(folder.glob("best-*=*/sglp_plan.json"))
    return int(json.loads(plan.read_text(encoding="utf-8"))["settings"]["samples"])


def _healing(folder: Path) -> list[str]:
    file = folder / "sglp_healing.json"
    if not file.exists():
        return ["", "", "", ""]
    record = json.loads(file.read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    before, after = record["before"], record["after"]
    apart = f"{before['divergence']:.3f} -> {after['divergence']:.3f}" if "divergence" in before else ""
    return [apart, f"{record['tokens']:,}", f"{record['parameters'] / 1e6:.1f}M", f"{log[-1]['seconds'] / 60:.1f}"]


if __name__ == "__main__":
    main()
