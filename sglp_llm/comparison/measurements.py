"""The measurements that a comparison can make on a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sglp_llm.calibration import check_spec, evaluation_windows
from sglp_llm.comparison.measured import Losses, Measured, Measurement, Scored
from sglp_llm.evaluation.perplexity import summary
from sglp_llm.evaluation.side_by_side import AVERAGE, average
from sglp_llm.models.opened import OpenedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sglp_llm.evaluation.suites import Suite

_TASK_BATCH = 8


def perplexity_measurement(opened: OpenedModel, spec: str, window: int, max_windows: int | None) -> Measurement:
    """Perplexity on a text, on the same windows for all models.

    Args:
        opened: The model, for its tokenizer.
        spec: See `sglp_llm.calibration.texts.load_documents`; the test split by default.
        window: Tokens in one window.
        max_windows: Only the first ones.

    Raises:
        UserError: The text cannot be read, is too short, or the tokenizer is not the model's.
    """
    check_spec(spec)
    windows = evaluation_windows(opened.tokenizer, spec, window=window, max_windows=max_windows)
    opened.check_tokens(windows.input_ids)

    def summarise(losses: Sequence[float]) -> Measured:
        result = summary(torch.tensor(losses, dtype=torch.float64), windows)
        numbers = {"perplexity": result.perplexity, "perplexity_standard_error": result.perplexity_standard_error}
        return Measured(numbers, tuple(losses))

    count, length = windows.input_ids.shape
    name = windows.source if "/" not in windows.source else windows.source.rpartition("/")[2].partition(":")[0]
    return Losses(f"{name} ({count} x {length})", windows.input_ids, summarise)


def suite_measurements(
    opened: OpenedModel, suites: Sequence[str | Path], limit: int | None, data_dir: Path | None
) -> list[Measurement]:
    """For each suite its tasks, each with its metric, and their average.

    Args:
        opened: The model, for its tokenizer.
        suites: Their names or YAML files.
        limit: Only the first examples of each task.
        data_dir: Where tasks that read local files find them. Beside other suites, one that generates its files does so.

    Raises:
        UserError: A suite, a task or its data cannot be loaded.
    """
    if not suites:
        return []  # lm-eval is slow to import
    from sglp_llm.evaluation.suites import check_counts, load_suite

    check_counts(limit, None)
    loaded = [load_suite(suite) for suite in suites]
    alone = len(loaded) == 1
    return [
        _suite_measurement(opened, each, limit, data_dir if alone or not each.generate else None) for each in loaded
    ]


def _suite_measurement(opened: OpenedModel, suite: Suite, limit: int | None, data_dir: Path | None) -> Measurement:
    from sglp_llm.evaluation.harness import evaluate_tasks, open_suite, scores

    suite_tasks = open_suite(suite, data_dir)

    def measure(model: PreTrainedModel) -> Measured:
        results = evaluate_tasks(model, opened.tokenizer, suite_tasks, limit=limit, batch_size=_TASK_BATCH)
        found = scores(results, suite_tasks)
        named = {f"{score.task} {score.metric}": score for score in found}
        if (mean := average(found)) is not None:
            named[AVERAGE] = mean
        numbers: dict[str, float] = {}
        for name, score in named.items():
            numbers[name] = score.value
            if score.stderr is not None:
                numbers[f"{name}_standard_error"] = score.stderr
        return Measured(numbers)

    examples = "" if limit is None else f" (first {limit})"
    key = f"suite {suite_tasks.suite} in {data_dir}, limit {limit}, and average"
    return Scored(f"{suite_tasks.suite.name}{examples}", key, measure)
