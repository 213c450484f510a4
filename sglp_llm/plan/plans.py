"""PrunePlan <-> JSON. A hand-written plan needs only ``num_layers`` and one of ``kept`` and ``removed``.

The replaced tensors of a compensated plan are in a file in safetensors format beside the JSON, which names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglp_llm.errors import UserError, unknown
from sglp_llm.plan.plan_fields import (
    MOST_LAYERS,
    checked_indices,
    footprint_of,
    identity_of,
    scores_of,
    segments_of,
    similarity_of,
    typed,
)
from sglp_llm.records import PrunePlan
from sglp_llm.small_files import read_json

if TYPE_CHECKING:
    import torch

PLAN_SCHEMA_VERSION = 1
MOST_PLAN_BYTES = 2**26
"""The largest plan, most of it the similarity matrix: about 20 bytes for each pair of layers."""
PLAN_FILE_NAME = "sglp_plan.json"
# Not .safetensors: vLLM and SGLang load every *.safetensors of a folder that has no index, and would take these for weights.
TENSORS_SUFFIX = ".tensors"

KEYS = (
    "schema_version",
    "source",
    "revision",
    "num_layers",
    "kept",
    "removed",
    "segments",
    "scores",
    "similarity",
    "footprint",
    "budget",
    "settings",
    "versions",
)
"""Keys of every plan."""

COMPENSATION_KEYS = ("compensation", "replaced")
"""Keys that only compensated plans have."""


def plan_from_indices(num_layers: int, removed: Iterable[int]) -> PrunePlan:
    """The plan that removes the given layers of a model of ``num_layers`` layers.

    Raises:
        UserError: An index is out of range or occurs twice, no layer is removed, or none is kept.
    """
    gone = checked_indices(list(removed), num_layers, "removed layers")
    return _checked(PrunePlan(num_layers, tuple(layer for layer in range(num_layers) if layer not in gone)), "the plan")


def plan_to_dict(plan: PrunePlan) -> dict[str, Any]:
    """The plan as a JSON object; its keys are `KEYS`, and `COMPENSATION_KEYS` where they apply.

    Of the replaced tensors it holds only names and shapes.
    """
    compensated: dict[str, Any] = {}
    if plan.compensation:
        compensated["compensation"] = dict(plan.compensation)
    if plan.replaced:
        compensated["replaced"] = {"tensors": {name: list(tensor.shape) for name, tensor in plan.replaced.items()}}
    return {
        "schema_version": PLAN_SCHEMA_VERSION,
        "source": None if plan.source is None else vars(plan.source),
        "revision": plan.revision,
        "num_layers": plan.num_layers,
        "kept": list(plan.kept),
        "removed": list(plan.removed),
        "segments": [[segment.start, segment.stop] for segment in plan.segments],
        "scores": {name: list(values) for name, values in plan.scores.items()},
        "similarity": None
        if plan.similarity is None
        else {"kernel": plan.similarity.kernel, "values": plan.similarity.values.tolist()},
        "footprint": None if plan.footprint is None else asdict(plan.footprint),
        "budget": dict(plan.budget),
        "settings": dict(plan.settings),
        "versions": dict(plan.versions),
        **compensated,
    }


def save_plan(plan: PrunePlan, path: Path) -> None:
    """Writes the plan as JSON.

    Replaced tensors go into a file of the same name that ends in `TENSORS_SUFFIX`.
    """
    data = plan_to_dict(plan)
    if plan.replaced:
        from sglp_llm.tensor_files.tensors import sha256_of, write_tensors

        tensors = path.with_suffix(TENSORS_SUFFIX)
        write_tensors(tensors, plan.replaced)
        data["replaced"] = {"file": tensors.name, "sha256": sha256_of(tensors), **data["replaced"]}
    path.write_text(plan_text(data))


def plan_text(data: Mapping[str, Any]) -> str:
    """A plan's JSON object as text, one top-level key per line so that a person can read and edit it."""
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()) + "\n}\n"


def load_plan(path: str | Path) -> PrunePlan:
    """Reads a plan from a JSON file, or from ``sglp_plan.json`` in a folder, and its replaced tensors from the file beside it.

    Raises:
        UserError: There is no such file, it is not JSON, or it is not a plan; or its tensors are missing or differ.
    """
    file = Path(path)
    if file.is_dir():
        file = file / PLAN_FILE_NAME
    return plan_from_dict(read_json(file, "plan file", MOST_PLAN_BYTES), str(file), file.parent)


def plan_from_dict(data: object, where: str = "plan", folder: Path | None = None) -> PrunePlan:
    """Checks a decoded JSON object and makes a plan of it.

    Args:
        data: The decoded JSON.
        where: File name for messages.
        folder: Folder of the file with the replaced tensors; without it the plan may not replace any.

    Raises:
        UserError: A key is unknown, missing or of the wrong type, the indices do not fit ``num_layers``, or the replaced tensors
            are missing, differ from those that were saved, or do not belong to kept layers.
    """
    fields: dict[str, Any] = typed(data, dict, where, "the plan", "a JSON object")
    for key in fields:
        if key not in KEYS + COMPENSATION_KEYS:
            raise UserError(f"{where}: {unknown('key', key, KEYS + COMPENSATION_KEYS)}")
    version = fields.get("schema_version", PLAN_SCHEMA_VERSION)
    if type(version) is not int or version != PLAN_SCHEMA_VERSION:
        raise UserError(f"{where}: schema_version {version!r} is not {PLAN_SCHEMA_VERSION}, the one this release reads")
    num_layers = fields.get("num_layers")
    if type(num_layers) is not int or num_layers < 1:
        raise UserError(f"{where}: num_layers must be a positive whole number, not {num_layers!r}")
    if num_layers > MOST_LAYERS:
        raise UserError(f"{where}: num_layers is {num_layers}, and no model has more than {MOST_LAYERS}")
    optional = {key: value for key, value in fields.items() if value is not None}
    plan = PrunePlan(
        num_layers=num_layers,
        kept=_kept(fields, num_layers, where),
        source=identity_of(fields.get("source"), where),
        revision=typed(optional.get("revision"), (str, type(None)), where, "revision", "a text"),
        segments=segments_of(optional.get("segments", []), num_layers, where),
        scores=scores_of(optional.get("scores", {}), num_layers, where),
        similarity=similarity_of(fields.get("similarity"), num_layers, where),
        footprint=footprint_of(fields.get("footprint"), num_layers, where),
        budget=typed(optional.get("budget", {}), dict, where, "budget", "an object"),
        settings=typed(optional.get("settings", {}), dict, where, "settings", "an object"),
        versions=typed(optional.get("versions", {}), dict, where, "versions", "an object"),
        replaced=_replaced(optional.get("replaced"), folder, where),
        compensation=typed(optional.get("compensation", {}), dict, where, "compensation", "an object"),
    )
    return _checked(plan, where)


def _kept(data: Mapping[str, Any], num_layers: int, where: str) -> tuple[int, ...]:
    given = {
        key: checked_indices(data[key], num_layers, f"{where}: {key}") for key in ("kept", "removed") if key in data
    }
    if not given:
        raise UserError(f"{where}: a plan needs one of 'kept' and 'removed'")
    everything = set(range(num_layers))
    kept = given["kept"] if "kept" in given else everything - given["removed"]
    if "removed" in given and kept != everything - given["removed"]:
        raise UserError(f"{where}: 'kept' and 'removed' contradict each other; give one of them")
    return tuple(sorted(kept))


def _checked(plan: PrunePlan, where: str) -> PrunePlan:
    if not plan.kept:
        raise UserError(f"{where}: all {plan.num_layers} layers would be removed; at least one must stay")
    if not plan.removed:
        raise UserError(f"{where}: no layer would be removed")
    check_replaced(plan, where)
    return plan


def check_replaced(plan: PrunePlan, where: str) -> None:
    """Checks that the replaced tensors belong to kept layers.

    Raises:
        UserError: One does not; the message begins with ``where``.
    """
    for name in plan.replaced:
        found = re.search(
            r"\.(0|[1-9][0-9]{0,8})\.", name
        )  # in every family the first number on the path is the layer's
        if found is None or int(found[1]) >= plan.num_layers:
            raise UserError(
                f"{where}: replaced: {name!r} is not the name of a parameter of layers 0..{plan.num_layers - 1}"
            )
        if int(found[1]) not in plan.kept:
            raise UserError(f"{where}: replaced: {name!r} belongs to layer {int(found[1])}, which the plan removes")


def _replaced(value: object, folder: Path | None, where: str) -> dict[str, torch.Tensor]:
    if value is None:
        return {}
    fields = typed(value, dict, where, "replaced", "an object with file, sha256 and tensors")
    if set(fields) != {"file", "sha256", "tensors"} or folder is None:
        raise UserError(
            f"{where}: replaced must have exactly file, sha256 and tensors, and the file lie beside the plan"
        )
    name, shapes = fields["file"], typed(fields["tensors"], dict, where, "replaced.tensors", "an object of shapes")
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise UserError(f"{where}: replaced.file must be a plain file name, not {name!r}")
    file = folder / name
    if not file.is_file():
        raise UserError(f"{where}: the plan's replaced tensors are missing: {name} must lie beside it")
    from sglp_llm.tensor_files.tensors import read_tensors, sha256_of

    try:
        digest = sha256_of(file)
    except OSError as error:
        raise UserError(f"{where}: cannot read {name} ({error.strerror})") from None
    if digest != fields["sha256"]:
        raise UserError(f"{where}: {name} does not hold the tensors that the plan was saved with: its sha256 differs")
    tensors = read_tensors(file)
    for tensor, shape in shapes.items():
        if tensor not in tensors:
            raise UserError(f"{where}: replaced: there is no {tensor!r} in {name}")
        if list(tensors[tensor].shape) != shape:
            raise UserError(
                f"{where}: replaced: {tensor!r} has the shape {list(tensors[tensor].shape)} in {name}, not {shape}"
            )
    return {tensor: tensors[tensor] for tensor in shapes}
