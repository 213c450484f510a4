"""Writes docs/healing.md from what tools/healing.sh has measured: python tools/healing_page.py FOLDER PAGE SETTINGS."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from machine import describe

TEXTS = {"wikitext2": "WikiText-2", "c4": "C4"}
SUITES = {"offline": "tasks", "generation_offline": "generation"}

HEAD = """# What training after a removal adds

SmolLM2-135M-Instruct without some of its 30 decoder layers, before and after `sglp-llm heal`. Made by `tools/healing.sh DATA`,
which says what is trained on and what is measured on: the two have no text in common.

- Columns named after a text are ln(perplexity / dense perplexity) on windows of 512 tokens. The standard error is that of the
  difference of two means as if the windows were not the same ones, and so too large.
- `tasks` is the average over the tasks of the suite `offline`, `generation` that of the suite `generation_offline`.
- `divergence` is the KL from the original on held-out training text, nats a token, before and after; `tokens` are those until the
  weights that were kept.
- A name with `+` was trained: `full` all parameters, `partial` the layers around the cuts, the last ones and the head, `seam` the
  layers around the cuts, `lora` adapters of rank 16 on all linears; `no-teacher` by the next-token loss alone.
- The text is WikiText-2 and C4 in equal parts. `-wikitext2` and `-c4` say that it was that one alone, `-self` that the original
  model sampled it (`--data self`), and `-80k` that it was the same `heal` command with `--tokens 80k`, given by hand.
"""


def main() -> None:
    folder, page = map(Path, sys.argv[1:3])
    names = sorted({file.name.removesuffix(".wikitext2.json") for file in folder.glob("*.wikitext2.json")})
    dense = "dense"
    suites = [suite for suite in SUITES if (folder / f"{dense}.{suite}.json").exists()]
    columns = [*TEXTS.values(), *(SUITES[suite] for suite in suites), "divergence", "tokens", "parameters", "minutes"]
    lines = [f"| model | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in sorted(names, key=lambda each: (each != dense, _depth(each), each)):
        cells = [_gap(folder, name, text, dense) for text in TEXTS]
        cells += [_average(folder, name, suite) for suite in suites]
        lines.append(f"| `{name}` | {' | '.join([*cells, *_healing(folder / name)])} |")
    windows = {text: _read(folder, dense, text)["windows"] for text in TEXTS}
    said = " and ".join(f"{count} windows of {TEXTS[text]}" for text, count in windows.items())
    measured = f"Measured on {said}, with `{sys.argv[3]} tools/healing.sh DATA`; machine: {describe()}."
    page.write_text(f"{HEAD}\n{measured}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def _read(folder: Path, name: str, what: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / f"{name}.{what}.json").read_text(encoding="utf-8"))
    return data


def _depth(name: str) -> int:
    return int(name.partition("+")[0].rpartition("-")[2]) if name.partition("+")[0].rpartition("-")[2].isdigit() else 0


def _gap(folder: Path, name: str, text: str, dense: str) -> str:
    own, whole = _read(folder, name, text), _read(folder, dense, text)
    if name == dense:
        return f"perplexity {own['perplexity']:.2f}"
    error = (own["nll_standard_error"] ** 2 + whole["nll_standard_error"] ** 2) ** 0.5
    return f"{own['mean_nll'] - whole['mean_nll']:.3f} ± {error:.3f}"


def _average(folder: Path, name: str, suite: str) -> str:
    file = folder / f"{name}.{suite}.json"
    if not file.exists():
        return ""
    scores = {each["task"]: each for each in json.loads(file.read_text(encoding="utf-8"))["scores"]}
    mean = scores["average"]
    return f"{mean['value']:.3f} ± {mean['stderr']:.3f}"


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
