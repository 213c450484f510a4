"""Trains the models of a comparison after the removal, each different one once."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglp_llm.calibration import CalibrationSet
from sglp_llm.checkpoint import remove_folder
from sglp_llm.comparison.measured import Shortened
from sglp_llm.errors import UserError
from sglp_llm.healing.heal import heal
from sglp_llm.models.opened import OpenedModel
from sglp_llm.pipeline import prune
from sglp_llm.plan import load_plan
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.progress import Progress
from sglp_llm.tensor_files.tensors import sha256_of
from sglp_llm.trials import Journal

_FOLDER = "healed"
_PRUNED, _TRAINED = "pruned", "trained"


@dataclass(frozen=True)
class RunOfComparison:
    """What all methods of a comparison share."""

    opened: OpenedModel
    calibration: CalibrationSet
    journal: Journal
    folder: Path
    progress: Progress


@dataclass(frozen=True)
class DecidedRow:
    """A row's model, the folder of its plan, and the seconds of its compensation and training."""

    model: Shortened
    folder: Path
    seconds: float


def trained_after(run: RunOfComparison, row: DecidedRow, recipe: HealingRecipe) -> DecidedRow:
    """The row with its model trained on the original's predictions.

    The checkpoint is kept in ``healed/`` in the comparison's folder; an interrupted training is resumed.

    Args:
        run: What all methods share.
        row: The row without training.
        recipe: How it is trained.

    Raises:
        UserError: The model is live, or training fails.
    """
    source = run.opened.source
    if source is None:
        raise UserError("+heal trains a checkpoint, and a live model has none: save it, and compare the folder")
    what = f"{row.model} trained by {recipe.to_dict()}"
    folder = run.folder / _FOLDER / hashlib.sha256(what.encode()).hexdigest()[:12]

    def train() -> dict[str, Any]:
        start = time.perf_counter()
        run.opened.release()  # teacher and student need the room
        pruned, trained = folder / _PRUNED, folder / _TRAINED
        folder.mkdir(parents=True, exist_ok=True)
        if not pruned.exists():
            prune(source.path, pruned, plan=load_plan(row.folder), verify=False, progress=run.progress)
        chosen = replace(recipe, teacher=str(source.path)) if recipe.distil and recipe.teacher is None else recipe
        work = trained.with_name(f"{trained.name}.healing")
        heal(pruned, trained, recipe=chosen, resume=work.exists(), progress=run.progress, verify=False, overwrite=True)
        remove_folder(pruned, trained)
        digest = sha256_of(*sorted(trained.glob("*.safetensors")))[:16]
        return {"digest": digest, "seconds": time.perf_counter() - start}

    kept = run.journal.once(what, train)
    model = replace(row.model, tensors=kept["digest"], folder=folder / _TRAINED, is_trained=True)
    return replace(row, model=model, seconds=row.seconds + kept["seconds"])
