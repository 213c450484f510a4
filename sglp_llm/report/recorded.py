"""Keeps what was measured of a shortened checkpoint in its folder, where its model card and its report show it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sglp_llm.plan.published import without_paths
from sglp_llm.plan.results import Result, keep_results
from sglp_llm.report.html import write_report
from sglp_llm.report.numbers import shown
from sglp_llm.small_files import replace_text

RESULTS_PLACE = ("<!-- results -->", "<!-- end of results -->")
"""Between these lines of a model card stand the results; the rest of it is its author's."""


def record(folder: Path, results: Sequence[Result]) -> None:
    """Adds results to a folder that holds a plan: to ``sglp_results.json``, the model card if there is one, and the report.

    Raises:
        UserError: The results in the folder are damaged.
    """
    kept = keep_results(folder, results)
    card = folder / "README.md"
    if card.is_file():
        _write_into_card(card, kept)
    write_report(folder)


def results_table(results: Sequence[Result]) -> str:
    """The results in Markdown."""
    lines = ["| measured | metric | the original | this model |", "|---|---|---|---|"]
    for each in results:
        before = "" if each.original is None else shown(each.original, each.original_stderr)
        name = f"{without_paths(each.name)}, {each.conditions}"
        cells = (name, each.metric, before, shown(each.value, each.stderr))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _write_into_card(card: Path, results: Sequence[Result]) -> None:
    from huggingface_hub import EvalResult, ModelCard

    found = ModelCard.load(card, ignore_metadata_errors=True)
    names = {(without_paths(each.name), _metric_name(each)) for each in results}
    others = [each for each in found.data.eval_results or [] if (each.dataset_name, each.metric_name) not in names]
    found.data.model_name = found.data.model_name or card.resolve().parent.name
    found.data.eval_results = others + [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w.-]+", "-", without_paths(each.name)).strip("-") or "text",
            dataset_name=without_paths(each.name),
            metric_type=each.metric,
            metric_value=each.value,
            metric_name=_metric_name(each),
        )
        for each in results
    ]
    begin, end = RESULTS_PLACE
    section = f"{begin}\n\n## Results\n\n{results_table(results)}\n\n{end}"
    place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    text, replaced = place.subn(lambda _: section, found.text, count=1)
    found.text = text if replaced else f"{found.text.rstrip()}\n\n{section}\n"
    replace_text(card, f"---\n{found.data}\n---\n{found.text}")


def _metric_name(result: Result) -> str:
    return f"{result.metric}, {result.conditions}"
