"""Writes docs/healing.md from what tools/healing.sh has measured: python tools/healing_page.py FOLDER PAGE.

Rows of the page whose measurements are not in the folder stay as they are.
"""

from __future__ import annotations

import json
import re
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

- A name says what shortened the model and how many layers it lacks: `search+linear-6` is `--criterion search --compensate linear
  --drop 6`, `learned-6` has `--compensate learned --trial-samples 4` instead, `sglp-6` the paper's recipe without a repair.
- Columns named after a text are ln(perplexity / dense perplexity) on windows of 512 tokens. The standard error is that of the
  difference of two means as if the windows were not the same ones, and so too large.
- Perplexity and tasks are computed in bfloat16, which changes a mean by 0.001.
- Minutes are wall time of training on one thread, with another measurement on the other core.
- The text is WikiText-2 (train) and C4 in equal parts, in sequences of 256 tokens. Where nothing else is said, four are
  a step, and the rate of all parameters is 2e-4.
"""

PARAMETERS = """## Which parameters

`full` are all parameters, `partial` the layers around the cuts, the last ones and the head, `seam` the layers around the cuts,
`lora` adapters of rank 16 on all linears. `no-teacher` learns the next token of the text alone. `divergence` is the KL from the
original on held-out training text, nats a token, before and after; `tokens` are those until the weights that were kept. Without
a teacher a model also learns the style of its text, most of all that of WikiText-2, and may lose something else for it: the
columns then say how well the text is learned, rather than how near the model is to the original. Measured on 64 windows of each
text.

`learned-6` was made anew before `partial` was trained from it; the other rows of `learned-6` began at 0.366 and 0.333.
`closed-form-9` with its rows, `learned-9+full` and `sglp-9+full` come from the second machine, where the dense perplexities are
29.45 and 34.55 and the minutes of the last two are too long, because it did much other work.
"""

LONG = """## With more time

All parameters, trained with `--minutes`. `tasks` is the average over the nine tasks of the suite `offline`, `generation` the
average exact match of the suite `generation_offline`, with 100 examples a task unless LIMIT says otherwise; `repetition` is that
suite's share of repeated 4-grams in free text, where less is better. Measured on 302 windows of each text: the second half of
WikiText-2's test split, and as much C4.
"""

BY_TEXT = """## Which text

`=TEXT` says what a model was calibrated on, and `fast` trained on too. After `full` it says what all parameters of
`search+linear-6` were trained on with 20k tokens: one kind of text alone, or what the original samples itself (`self`). A column
whose text is the row's own says how well that kind is learned; the others say what carries over. The removals are calibrated on
64 sequences of 256 tokens and the model is measured on 64 windows of each text; in the rows that are not `fast` both are 32, and
the difference is to the original on the same 32.
"""

RATES = """## Which rate

All parameters of `angular+refit-6` (`--criterion angular --compensate refit --drop 6`), trained with 20k tokens: the KL from the
original and the next-token loss on held-out training text, nats a token. Nothing here has seen the text that models are measured
on. Before training they are 0.519 and 4.358. A step more costs time, so that two sequences a step take about a quarter more time
for the same tokens than four, and one takes about half more. The presets keep four and 2e-4. With two and 1e-4 the training of
`best-6` ends at a divergence of 0.277 instead of 0.280, which is not worth the time, and the windows of the next section show no
gain: 0.189 and 0.196.
"""

PRESETS = """## The presets

Everything that `prune --preset NAME` does, calibrated and trained on the text above, 64 sequences of 256 tokens for the choice of
layers. `minutes` is the whole command, with two threads (`closed-form-6`, `fast-9` and `best-9`: with one);
columns as in the section before last.
"""


def main() -> None:
    folder, page = map(Path, sys.argv[1:3])
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    suites = ("offline", "generation_offline", "repetition")
    parameters = _rows(folder, before, PARAMETERS, "sample", ("wikitext2", "c4"), (), True)
    long = _rows(folder, before, LONG, "whole", ("wikitext2", "c4"), suites, True)
    presets = _rows(folder, before, PRESETS, "preset", ("wikitext2", "c4"), suites, True)
    by_text = _rows(folder, before, BY_TEXT, "texts", ("wikitext2", "c4", "alpaca"), ("offline",), False)
    sections = [
        HEAD,
        _machines(before),
        PARAMETERS,
        _table(parameters, ("wikitext2", "c4"), (), True),
        _order(parameters),
        LONG,
        _table(long, ("wikitext2", "c4"), suites, True),
        RATES,
        _rates(folder, before),
        PRESETS,
        _table(presets, ("wikitext2", "c4"), suites, True),
        BY_TEXT,
        _table(by_text, ("wikitext2", "c4", "alpaca"), ("offline",), False),
    ]
    page.write_text("\n".join(sections), encoding="utf-8")


def _rates(folder: Path, page: str) -> str:
    """The held-out divergence by sequences a step and rate: what was measured, and the page's other rows."""
    rows = known_rows(page.partition("## Which rate\n")[2].partition("\n## ")[0].splitlines())
    for file in folder.glob("*+rate-*/sglp_healing.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        sequences, _, rate = file.parent.name.partition("+rate-")[2].partition("x")
        after = record["after"]
        rows[rate] = [*rows.get(rate, [""] * 3)]
        rows[rate][(4, 2, 1).index(int(sequences))] = f"{after['divergence']:.3f}, {after['next_token_loss']:.3f}"
    lines = ["| rate | 4 sequences a step | 2 | 1 |", "|---|---|---|---|"]
    lines += [
        f"| `{rate}` | {' | '.join(cells)} |" for rate, cells in sorted(rows.items(), key=lambda each: -float(each[0]))
    ]
    return "\n".join(lines) + "\n"


def _machines(page: str) -> str:
    """Those that the page's rows come from, and this one."""
    known = [line for line in page.splitlines() if line.startswith("Machine: ")]
    return "\n".join(dict.fromkeys([*known, f"Machine: {describe()}."])) + "\n"


def _rows(
    folder: Path, page: str, section: str, kind: str, texts: Sequence[str], suites: Sequence[str], healing: bool
) -> dict[str, list[str]]:
    """The cells of a section's table by the model's name: what was measured, and the page's rows of other models."""
    heading = section.partition("\n")[0]
    lines = page.partition(heading)[2].partition("\n## ")[0].splitlines()
    rows = known_rows(lines)
    for name in {file.name.removesuffix(f".{kind}.wikitext2.json") for file in folder.glob(f"*.{kind}.wikitext2.json")}:
        cells = [_gap(folder, name, kind, text) for text in texts]
        cells += [_score(folder, name, kind, suite) for suite in suites]
        rows[name] = cells + (_healing(folder / name) if healing else [])
    return rows


def known_rows(lines: Sequence[str]) -> dict[str, list[str]]:
    """The cells of a table in Markdown, by the name in backticks at the beginning of a row."""
    rows = [line for line in lines if line.startswith("| `")]
    return {row.split("`")[1]: [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}


def _table(rows: dict[str, list[str]], texts: Sequence[str], suites: Sequence[str], healing: bool) -> str:
    titles = {"offline": "tasks", "generation_offline": "generation", "repetition": "repetition"}
    columns = [TEXTS[text] for text in texts] + [titles[suite] for suite in suites]
    columns += ["divergence", "tokens", "parameters", "minutes"] if healing else []
    lines = [f"| model | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in sorted(rows, key=lambda each: (each != DENSE, _depth(each), each)):
        lines.append(f"| `{name}` | {' | '.join(rows[name])} |")
    return "\n".join(lines) + "\n"


def _order(rows: dict[str, list[str]]) -> str:
    """Whether training changes which model is best, among those of one depth."""
    found: dict[int, dict[str, tuple[float, float]]] = {}
    for name in rows:
        if f"{name}+full" in rows:
            found.setdefault(_depth(name), {})[name] = (_mean(rows[name]), _mean(rows[f"{name}+full"]))
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


def _mean(cells: Sequence[str]) -> float:
    return sum(float(cell.split()[0]) for cell in cells[:2]) / 2


def _read(folder: Path, name: str, kind: str, what: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / f"{name}.{kind}.{what}.json").read_text(encoding="utf-8"))
    return data


def _depth(name: str) -> int:
    found = re.search(r"-(\d+)(?=[+=]|$)", name)
    return int(found[1]) if found else 0


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


def _healing(folder: Path) -> list[str]:
    file = folder / "sglp_healing.json"
    if not file.exists():
        return ["", "", "", _minutes(folder, None)]
    record = json.loads(file.read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    before, after = record["before"], record["after"]
    apart = f"{before['divergence']:.3f} -> {after['divergence']:.3f}" if "divergence" in before else ""
    return [apart, f"{record['tokens']:,}", f"{record['parameters'] / 1e6:.1f}M", _minutes(folder, log[-1]["seconds"])]


def _minutes(folder: Path, training: float | None) -> str:
    """The whole command's time where it was measured, otherwise that of the training."""
    file = folder.with_name(f"{folder.name}.seconds")
    seconds = float(file.read_text(encoding="utf-8")) if file.exists() else training
    return "" if seconds is None else f"{seconds / 60:.1f}"


if __name__ == "__main__":
    main()
