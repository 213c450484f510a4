"""``sglp_results.json``: what was measured of a shortened checkpoint, kept in its folder beside the plan."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglp_llm.errors import UserError
from sglp_llm.small_files import read_json, replace_text

RESULTS_FILE_NAME = "sglp_results.json"
_FORMAT = 1


@dataclass(frozen=True)
class Result:
    """One number of a shortened checkpoint, and the same number of the original.

    Attributes:
        name: The text, the task, or what was timed.
        metric: What the number is, such as ``perplexity`` or ``acc_norm``.
        conditions: What it depends on, in words: windows, examples, numeric type.
        value: The number.
        stderr: Its standard error; ``None`` where there is none.
        original: The original model's number; ``None`` where it was not measured.
        original_stderr: Its standard error.
        higher_is_better: Whether a higher value is better.
    """

    name: str
    metric: str
    conditions: str
    value: float
    stderr: float | None
    original: float | None
    original_stderr: float | None
    higher_is_better: bool

    @property
    def what(self) -> tuple[str, str, str]:
        """What was measured: a newer number takes the place of an older one."""
        return self.name, self.metric, self.conditions


def read_results(folder: Path) -> list[Result]:
    """The results in a folder, in the order in which they were first measured; none without the file.

    Raises:
        UserError: The file is damaged.
    """
    file = folder / RESULTS_FILE_NAME
    if not file.is_file():
        return []
    data = read_json(file, "results")
    try:
        return [_result(entry) for entry in data["results"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged, or not written by sglp-llm: measure again without it") from error


def keep_results(folder: Path, results: Sequence[Result]) -> list[Result]:
    """Adds results to those in a folder, and returns all of them.

    Raises:
        UserError: The file in the folder is damaged.
    """
    kept = {each.what: each for each in [*read_results(folder), *results]}
    data = {"format": _FORMAT, "results": [asdict(each) for each in kept.values()]}
    replace_text(folder / RESULTS_FILE_NAME, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    return list(kept.values())


def _result(entry: Any) -> Result:
    result = Result(**entry)
    numbers = [number for number in (result.stderr, result.original, result.original_stderr) if number is not None]
    if not all(isinstance(text, str) for text in result.what) or not isinstance(result.higher_is_better, bool):
        raise TypeError("a name is not text")
    if not all(type(number) in (int, float) and math.isfinite(number) for number in [result.value, *numbers]):
        raise TypeError("a number is none")
    return result
