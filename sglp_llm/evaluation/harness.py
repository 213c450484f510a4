"""Runs lm-eval on a model in memory. The only module that imports `lm_eval`, which is slow to import."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from sglp_llm.errors import UserError, unknown
from sglp_llm.evaluation.records import TaskScore
from sglp_llm.evaluation.suites import Suite, check_batch_size, check_counts, data_folder, local_files, suite_of
from sglp_llm.models.hub import offline_when_unreachable
from sglp_llm.models.modes import evaluating

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LOCAL = "--suite offline --data-dir DIR"


@dataclass(frozen=True)
class OpenSuite:
    """A suite with its tasks and their data loaded.

    Attributes:
        suite: The requested suite.
        manager: lm-eval's index of the tasks.
        tasks: lm-eval's own tasks and groups, by name; a tag is replaced by its tasks.
        metrics: The metric of each, as in `Suite.tasks`.
    """

    suite: Suite
    manager: Any
    tasks: Mapping[str, Any]
    metrics: Mapping[str, str]


def open_suite(suite: Suite, data_dir: Path | None = None) -> OpenSuite:
    """Finds the tasks and reads their data, before any model is loaded.

    Args:
        suite: Which tasks.
        data_dir: Where tasks that read local files find them; see `suites.data_folder`.

    Raises:
        UserError: A task or metric is unknown, or its data cannot be loaded.
    """
    data = data_folder(suite, data_dir)
    with _quiet():
        manager = _manager(suite)
        tasks: dict[str, Any] = {}
        metrics: dict[str, str] = {}
        with offline_when_unreachable():
            for name, metric in suite.tasks.items():
                for found, task in _load(manager, name, data).items():
                    tasks[found], metrics[found] = task, _checked_metric(found, task, metric)
        try:
            manager.load(list(tasks.values()))
        except ValueError as error:  # a task both by itself and inside a group
            raise UserError(f"{suite.name}: {error}") from None
    return OpenSuite(suite, manager, tasks, metrics)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: str | Sequence[str] | Suite | OpenSuite,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    data_dir: Path | None = None,
    name: str | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Runs tasks of lm-eval on a live model; the numbers are those of the plain ``lm_eval`` command.

    Args:
        model: Any causal language model of transformers, on any device; its training mode is restored.
        tokenizer: The model's.
        tasks: ``"piqa,arc_easy"``, a list of names, a suite, or an opened one.
        limit: Only the first examples of each task; none = as the suite says.
        num_fewshot: Examples in the prompt; none = as the suite, then each task says.
        batch_size: Sequences computed at once; ``auto`` (on a GPU) tries how many fit.
        data_dir: See `open_suite`.
        name: Name of the model in the results.
        output: Folder for ``MODEL/results_TIME.json``, where lm-eval's other tools look for it.

    Returns:
        The results as plain data, in lm-eval's own form.

    Raises:
        UserError: See `open_suite`; also an invalid batch size, or a model whose losses are not finite.
        OSError: The results cannot be written.
    """
    check_counts(limit, num_fewshot)
    check_batch_size(batch_size, str(model.device.type))
    if not isinstance(tasks, OpenSuite):
        if not isinstance(tasks, Suite):
            tasks = suite_of(tasks if isinstance(tasks, str) else ",".join(tasks))
        tasks = open_suite(tasks, data_dir)
    suite = tasks.suite
    arguments = {"pretrained": name or model.config.name_or_path or type(model).__name__}
    with _quiet(), evaluating(model), offline_when_unreachable(), _shots_kept(tasks):
        tracker = EvaluationTracker(output_path=None if output is None else str(output))
        tracker.general_config_tracker.log_experiment_args("hf", arguments, None, None, True)
        results = simple_evaluate(
            _FiniteHFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            model_args=arguments,
            tasks=list(tasks.tasks.values()),
            num_fewshot=suite.num_fewshot if num_fewshot is None else num_fewshot,
            batch_size=batch_size,
            limit=suite.limit if limit is None else limit,
            log_samples=False,
            task_manager=tasks.manager,
        )
        assert results is not None  # it is None on the other ranks of a distributed run
        results["config"]["model"] = "hf"  # as the lm_eval command does; for a live model it would be the path again
        if output is not None:
            _save(tracker, results, output)
    plain: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return plain


def scores(results: Mapping[str, Any], suite: OpenSuite) -> list[TaskScore]:
    """The suite's metric of every task.

    Raises:
        UserError: A task did not measure it.
    """
    found = []
    for task, metric in suite.metrics.items():
        numbers = results["results"].get(task, {})
        keys = [key for key in numbers if key == metric or key.partition(",")[0] == metric]
        if not keys:
            known = [key for key in numbers if "," in key and "_stderr," not in key]
            raise UserError(f"{task}: {unknown('metric', metric, known)}")
        base, _, filters = keys[0].partition(",")
        error = numbers.get(f"{base}_stderr,{filters}")
        better = results["higher_is_better"].get(task, {}).get(base)
        found.append(
            TaskScore(
                task,
                metric,
                float(numbers[keys[0]]),
                float(error) if isinstance(error, int | float) else None,
                better is not False,
            )
        )
    return found


class _FiniteHFLM(HFLM):
    """lm-eval's model, but NaN is an error: it would otherwise be scored, as a wrong answer or a right one."""

    def _loglikelihood_tokens(self, *args: Any, **options: Any) -> Any:
        answers = super()._loglikelihood_tokens(*args, **options)
        if any(math.isnan(value) for value, _ in answers):
            raise _not_a_number("log-likelihood")
        return answers

    def generate_until(self, *args: Any, **options: Any) -> Any:
        with suppress(FloatingPointError):
            return super().generate_until(*args, **options)
        raise _not_a_number("logit")  # by now lm-eval's progress bar is gone, which would write after the message

    def _model_generate(self, *args: Any, **options: Any) -> Any:
        return super()._model_generate(*args, **options, logits_processor=[_finite])


def _finite(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The logits ``[sequences, vocabulary]`` of the next token, as they are; among NaN the greedy choice would be token 0.

    Raises:
        FloatingPointError: One is NaN.
    """
    if logits.isnan().any():
        raise FloatingPointError
    return logits


def _not_a_number(what: str) -> UserError:
    return UserError(
        f"a {what} is not a number; the weights are damaged, or they overflow in this dtype: try bfloat16 or float32"
    )


def _manager(suite: Suite) -> Any:
    """lm-eval's task index, of the suite's own tasks where they suffice: indexing all of lm-eval's takes 8 seconds."""
    folder = suite.include_path
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(suite.tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=folder)
    for name in suite.tasks:
        if name not in manager.task_index:
            near = get_close_matches(name.lower(), manager.all_tasks, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""  # there are too many to list them
            raise UserError(f"unknown task {name!r}{hint} (`lm_eval ls tasks` lists them)")
    return manager


def _load(manager: Any, name: str, data: Path | None) -> dict[str, Any]:
    """The task, the group, or the tag's tasks of that name."""
    config = manager.task_index[name].cfg or {}
    files = local_files(name, config, data)
    spec: Any = name
    if files:
        # lm-eval applies overrides to the members of a group only.
        own = {**config["dataset_kwargs"], "data_dir": str(data)} if data else config["dataset_kwargs"]
        spec = {"group": f"{name}_files", "task": [{"task": name, "dataset_kwargs": own}]}
    try:
        loaded = manager.load([spec])
    except ImportError as error:
        raise UserError(f"task {name!r} needs a package that is not installed ({error})") from None
    except Exception as error:  # offline, gone, gated, not JSON, lacking a field: each library has errors of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if files:
            raise UserError(f"{name}: cannot use {', '.join(map(str, files))} ({reason})") from None
        dataset = _dataset(manager.task_index, name) or "its data set"
        raise UserError(
            f"{name}: cannot read {dataset} from the Hugging Face Hub ({reason}); "
            f"to score on local files: {LOCAL}; without any: --suite generated"
        ) from None
    groups: dict[str, Any] = loaded["groups"]
    return {name: groups[name]} if name in groups else dict(loaded["tasks"])


def _dataset(index: Mapping[str, Any], name: str) -> str | None:
    """Where the data of a task, or of the first task of a group or tag, come from."""
    if name not in index:
        return None
    entry = index[name]
    config = entry.cfg or {}
    if "dataset_path" in config:
        return f"the data set {config['dataset_path']}"
    members = config.get("task") if isinstance(config.get("task"), list) else sorted(entry.tags)
    for member in members or []:
        key = member if isinstance(member, str) else member.get("task") or member.get("group")
        if isinstance(key, str) and key != name and (found := _dataset(index, key)):
            return found
    return None


def _checked_metric(name: str, task: Any, metric: str) -> str:
    """The requested metric, or the task's default; an unknown one is found before anything is computed."""
    known = [_metrics(leaf) for leaf in _leaves(task)]
    if not metric:
        first = known[0] or ["acc"]
        return "acc_norm" if all("acc_norm" in names for names in known) and not isinstance(task, Group) else first[0]
    for names in known:
        if names and metric.partition(",")[0] not in names:
            raise UserError(f"{name}: {unknown('metric', metric, names)}")
    return metric


def _leaves(task: Any) -> list[Any]:
    """The tasks of a group, or the task."""
    return list(task.get_all_tasks()) if isinstance(task, Group) else [task]


@contextmanager
def _shots_kept(opened: OpenSuite) -> Iterator[None]:
    """Restores ``num_fewshot`` of the tasks, which lm-eval overwrites: a 0 from one model would override the next one's."""
    leaves = [leaf for task in opened.tasks.values() for leaf in _leaves(task)]
    before = [leaf.get_config("num_fewshot") for leaf in leaves]
    try:
        yield
    finally:
        for leaf, shots in zip(leaves, before, strict=True):
            leaf.set_config("num_fewshot", shots)


def _metrics(task: Any) -> list[str]:
    """The metrics of a task; empty for one that is written in Python and lists none."""
    config = getattr(task, "config", None)
    listed = [entry.get("metric") for entry in getattr(config, "metric_list", None) or []]
    return [metric if isinstance(metric, str) else getattr(metric, "__name__", "") for metric in listed]


def _save(tracker: Any, results: dict[str, Any], output: Path) -> None:
    """Writes the results as the lm_eval command does, but raises an error where that only logs one."""
    before = set(output.rglob("results_*.json"))
    output.mkdir(parents=True, exist_ok=True)
    tracker.save_results_aggregated(results=results, samples=None)
    if not set(output.rglob("results_*.json")) - before:
        raise OSError(f"{output}: the results could not be written")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences lm-eval's warnings, which are about its own defaults, and what it prints to stdout, where results belong."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
