"""Scores shortened models on tasks, so that a search can take the finalist that is best at what its user needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch

from sglp_llm.analysis.decisions import Judge
from sglp_llm.checkpoint.export import shortened
from sglp_llm.errors import UserError
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import Recipe
from sglp_llm.plan.recipe import TASK
from sglp_llm.plan.shipped import shipped_suites

_EXAMPLES = 100
"""Examples of each task, unless the suite says how many."""
_BATCH = 8


def open_judge(recipe: Recipe, opened: OpenedModel) -> Judge | None:
    """The judge of the recipe's candidate sets: the mean score over the tasks of ``search.objective``; ``None`` without one.

    Perplexities count where there is nothing else. ``task:NAME`` is a suite from ``sglp-llm ls suites``, a suite's YAML file, or
    tasks of lm-eval separated by commas. The data of the tasks are loaded here.

    Args:
        recipe: Names the tasks.
        opened: The model.

    Raises:
        UserError: There is no such task, its data cannot be loaded, or the model does not fit into memory as a whole.
    """
    name = recipe.judging_task
    if name is None:
        return None
    if opened.streamed:
        raise UserError(f"objective of search: {TASK}{name} needs the whole model in memory: choose kl or loss")
    from sglp_llm.evaluation.harness import evaluate_tasks, open_suite, scores
    from sglp_llm.evaluation.suites import load_suite, suite_of

    is_suite = name in shipped_suites() or name.endswith((".yaml", ".yml"))
    suite = open_suite(load_suite(name) if is_suite else suite_of(name))
    limit = _EXAMPLES if suite.suite.limit is None else None

    def judge(removed: Sequence[int], replaced: Mapping[str, torch.Tensor]) -> float:
        with shortened(opened.load().model, removed, replaced) as model:
            found = scores(evaluate_tasks(model, opened.tokenizer, suite, limit=limit, batch_size=_BATCH), suite)
        better = [score.value for score in found if score.higher_is_better]
        return fmean(better) if better else -fmean(score.value for score in found)

    return judge
