"""What ``--plan`` takes -> PrunePlan: our JSON, mergekit's YAML, or the indices of the layers to remove."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sglp_llm.plan.mergekit import plan_from_mergekit
from sglp_llm.plan.plans import load_plan, plan_from_indices
from sglp_llm.plan.yaml_files import read_yaml
from sglp_llm.records import PrunePlan


def given_plan(given: str, depth: Callable[[], int]) -> PrunePlan:
    """The plan of a command line.

    Args:
        given: ``3,7,11``: 0-based indices of the layers to REMOVE; a ``.yaml`` or ``.yml`` file of mergekit; otherwise a JSON
            plan, or the folder it is in.
        depth: Returns the model's number of decoder layers, which only a JSON plan says itself.

    Raises:
        UserError: There is no such file, or what it says is no plan for a model of that depth.
    """
    if re.fullmatch(r"\s*[0-9]{1,9}(\s*,\s*[0-9]{1,9})*\s*", given):
        return plan_from_indices(depth(), map(int, given.split(",")))
    path = Path(given).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return plan_from_mergekit(read_yaml(path, "plan"), depth(), str(path))
    return load_plan(path)
