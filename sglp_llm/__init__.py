"""sglp-llm makes a large language model shorter by removing whole decoder layers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sglp_llm.version import __version__ as __version__

if TYPE_CHECKING:
    from sglp_llm.analysis.replanning import replan
    from sglp_llm.calibration import CalibrationSet
    from sglp_llm.checkpoint.export import drop_layers
    from sglp_llm.checkpoint.push import push
    from sglp_llm.errors import UserError
    from sglp_llm.evaluation.harness import evaluate_tasks
    from sglp_llm.healing.heal import heal
    from sglp_llm.pipeline import analyze, prune
    from sglp_llm.plan import Recipe, load_plan, load_recipe
    from sglp_llm.processes.distributed import current_processes
    from sglp_llm.records import Analysis, PrunePlan, RunReport


__all__ = [
    "Analysis",
    "CalibrationSet",
    "PrunePlan",
    "Recipe",
    "RunReport",
    "UserError",
    "analyze",
    "current_processes",
    "drop_layers",
    "evaluate_tasks",
    "heal",
    "load_plan",
    "load_recipe",
    "prune",
    "push",
    "replan",
]

# The module of each name. Importing them here would import torch, which costs `sglp-llm --help` two seconds (PEP 562).
_HOMES = {
    "Analysis": "records",
    "CalibrationSet": "calibration",
    "PrunePlan": "records",
    "Recipe": "plan",
    "RunReport": "records",
    "UserError": "errors",
    "analyze": "pipeline",
    "current_processes": "processes.distributed",
    "drop_layers": "checkpoint.export",
    "evaluate_tasks": "evaluation.harness",
    "heal": "healing.heal",
    "load_plan": "plan",
    "load_recipe": "plan",
    "prune": "pipeline",
    "push": "checkpoint.push",
    "replan": "analysis.replanning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
