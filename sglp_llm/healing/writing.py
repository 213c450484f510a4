"""Writes a healed checkpoint: the student's own files with other values, and everything that says how they came about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from sglp_llm.checkpoint.export import export_from_files
from sglp_llm.checkpoint.replaced import as_stored
from sglp_llm.healing.opening import HealingModels
from sglp_llm.healing.trained import Trained
from sglp_llm.plan import PLAN_FILE_NAME, RECIPE_FILE_NAME
from sglp_llm.plan.healing_recipe import (
    HEALING_FILE_NAME,
    HEALING_RECIPE_FILE_NAME,
    LOG_FILE_NAME,
    HealingRecipe,
    save_healing_recipe,
)
from sglp_llm.plan.plans import TENSORS_SUFFIX
from sglp_llm.progress import Progress
from sglp_llm.records import HealingRecord, PrunePlan
from sglp_llm.report.html import write_report
from sglp_llm.report.loss_curve import plot_losses
from sglp_llm.report.model_card import write_model_card
from sglp_llm.small_files import carried_files, copy_file, read_json_lines


def export(models: HealingModels, trained: Trained, folder: Path, progress: Progress) -> dict[str, torch.Tensor]:
    """Writes the student's checkpoint with what was learned in it; adapters are merged, and gone afterwards.

    Args:
        models: The student's files.
        trained: The student, with the weights that are kept.
        folder: An existing, empty folder.
        progress: Called with the bytes that are done.

    Returns:
        The changed parameters as they are stored, by name in the plain model.

    Raises:
        UserError: A number is not finite in the dtype of the files.
    """
    source = models.student.source
    assert source is not None
    learned = {
        name: each.detach().cpu() for name, each in trained.merged().named_parameters() if name in trained.changed
    }
    values = as_stored(models.student.config, source, learned)
    layers = models.student.num_layers
    export_from_files(source, PrunePlan(layers, tuple(range(layers)), replaced=values), folder, progress=progress)
    return values


def write_papers(models: HealingModels, folder: Path, record: HealingRecord, recipe: HealingRecipe, work: Path) -> None:
    """Everything beside the weights: the plan and recipe of the pruning, and the record, recipe and log of the healing."""
    assert models.student.source is not None
    source = models.student.source.path
    plan_tensors = Path(PLAN_FILE_NAME).with_suffix(TENSORS_SUFFIX).name
    for file in carried_files(source, (PLAN_FILE_NAME, plan_tensors, RECIPE_FILE_NAME)):
        copy_file(file, folder)
    save_healing_recipe(recipe, folder / HEALING_RECIPE_FILE_NAME)
    (folder / HEALING_FILE_NAME).write_text(json.dumps(record.to_dict(), indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(work / LOG_FILE_NAME, folder / LOG_FILE_NAME)
    plot_losses(read_json_lines(work / LOG_FILE_NAME, "log of a training"), folder)
    if models.plan is not None and models.plan.source is not None:
        write_model_card(folder / "README.md", models.plan, models.student.card, record.to_dict())
        write_report(folder)
