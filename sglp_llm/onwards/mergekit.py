"""A folder's plan -> mergekit's YAML, with which mergekit removes the same layers from the original."""

from __future__ import annotations

import shlex
from pathlib import Path

from sglp_llm.adapters.structure.config_keys import PER_LAYER
from sglp_llm.checkpoint.publish_file import atomic_file
from sglp_llm.errors import UserError
from sglp_llm.onwards.exported import Exported
from sglp_llm.plan import load_plan
from sglp_llm.plan.healing_recipe import HEALING_FILE_NAME
from sglp_llm.plan.mergekit import mergekit_yaml
from sglp_llm.small_files import read_json

MERGEKIT_FILE_NAME = "mergekit.yaml"


def export_mergekit(folder: Path, output: Path | None = None, overwrite: bool = False) -> Exported:
    """Writes the plan of a folder as ``merge_method: passthrough``.

    Args:
        folder: A folder that analyze, prune or heal has written.
        output: The file; by default ``mergekit.yaml`` in the folder.
        overwrite: Replace the file if it exists.

    Raises:
        UserError: The folder holds no plan, or the plan's model is none that mergekit reads; or the output exists.
    """
    plan = load_plan(folder)
    if plan.source is None:
        raise UserError(f"{folder}: the plan does not name its model, which mergekit's YAML must")
    if plan.source.name.endswith(".gguf"):
        raise UserError(f"{folder}: the plan's model {plan.source.name} is a GGUF file, which mergekit does not read")
    local = Path(plan.source.name).expanduser()
    # Another folder than the current one may be where mergekit is started.
    name = str(local.resolve()) if local.exists() else plan.source.name
    if plan.revision is not None:
        name += f"@{plan.revision}"
    if "+" in name:
        raise UserError(
            f"{folder}: mergekit takes what follows '+' in {name} for a LoRA; move the model, and prune again"
        )
    path = output or folder / MERGEKIT_FILE_NAME
    with atomic_file(path, overwrite) as partial:
        partial.write_text(mergekit_yaml(plan, name), encoding="utf-8")
    notes = []
    file = folder / "config.json"  # there is none after analyze
    config = read_json(file, "configuration") if file.exists() else {}
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a configuration: expected a JSON object")
    if lists := [key for key in config if key in PER_LAYER and isinstance(config[key], list)]:
        notes.append(
            f"mergekit 0.1.5 does not shorten {lists[0]} in the configuration, so that transformers 5 refuses its result; "
            "the folder itself is not affected"
        )
    if plan.replaced:
        notes.append("the weights that the compensation changed are not in it: mergekit copies the original's")
    if (folder / HEALING_FILE_NAME).is_file():
        notes.append("the training is not in it: mergekit copies the original's weights")
    return Exported((path,), tuple(notes), f"mergekit-yaml {shlex.quote(str(path))} OUTPUT")
