"""Returns plans and recipes: which layers are kept, and a run's settings, as records and as files. Start with `plans.py`."""

from __future__ import annotations

from sglp_llm.plan.plans import PLAN_FILE_NAME, load_plan, plan_from_indices, plan_to_dict, save_plan
from sglp_llm.plan.recipe import RECIPE_FILE_NAME, Recipe, load_recipe, save_recipe
from sglp_llm.plan.shipped import preset_names, preset_or_default, preset_settings

__all__ = [
    "PLAN_FILE_NAME",
    "RECIPE_FILE_NAME",
    "Recipe",
    "load_plan",
    "load_recipe",
    "plan_from_indices",
    "plan_to_dict",
    "preset_names",
    "preset_or_default",
    "preset_settings",
    "save_plan",
    "save_recipe",
]
