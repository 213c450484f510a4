"""PrunePlan <-> JSON. A plan that a person wrote needs only ``num_layers`` and one of ``kept`` and ``removed``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sglp_llm.errors import UserError, unknown
from sglp_llm.records import PLAN_SCHEMA_VERSION, ModelIdentity, PrunePlan, Segment

PLAN_FILE_NAME = "sglp_plan.json"

KEYS = (
    "schema_version",
    "source",
    "revision",
    "num_layers",
    "kept",
    "removed",
    "segments",
    "scores",
    "budget",
    "settings",
    "versions",
)


def plan_from_indices(num_layers: int, removed: Iterable[int]) -> PrunePlan:
    """The plan that removes the given layers of a model of ``num_layers`` layers.

    Raises:
        UserError: An index is out of range or stands twice, no layer is removed, or none is left.
    """
    gone = _checked_indices(list(removed), num_layers, "removed layers")
    return _checked(PrunePlan(num_layers, tuple(layer for layer in range(num_layers) if layer not in gone)), "the plan")


def plan_to_dict(plan: PrunePlan) -> dict[str, Any]:
    """The plan as the JSON object that `load_plan` reads; its keys are `KEYS`."""
    return {
        "schema_version": PLAN_SCHEMA_VERSION,
        "source": None if plan.source is None else vars(plan.source),
        "revision": plan.revision,
        "num_layers": plan.num_layers,
        "kept": list(plan.kept),
        "removed": list(plan.removed),
        "segments": [[segment.start, segment.stop] for segment in plan.segments],
        "scores": {name: list(values) for name, values in plan.scores.items()},
        "budget": dict(plan.budget),
        "settings": dict(plan.settings),
        "versions": dict(plan.versions),
    }


def save_plan(plan: PrunePlan, path: Path) -> None:
    """Writes the plan as JSON, one top-level key a line so that a person can read and edit it."""
    items = plan_to_dict(plan).items()
    path.write_text("{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in items) + "\n}\n")


def load_plan(path: str | Path) -> PrunePlan:
    """Reads a plan from a JSON file, or from ``sglp_plan.json`` in a folder.

    Raises:
        UserError: There is no such file, it is not JSON, or it is not a plan.
    """
    file = Path(path)
    if file.is_dir():
        file = file / PLAN_FILE_NAME
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such plan file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot read the plan ({error})") from None
    except RecursionError:
        raise UserError(f"{file}: not a JSON file that can be read (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{file}: not a JSON file ({error})") from None
    return plan_from_dict(data, str(file))


def plan_from_dict(data: object, where: str = "plan") -> PrunePlan:
    """Checks a decoded JSON object and makes a plan of it.

    Args:
        data: What JSON gave.
        where: File name for messages.

    Raises:
        UserError: A key is unknown, missing or of the wrong type, or the indices do not fit ``num_layers``.
    """
    fields: dict[str, Any] = _typed(data, dict, where, "the plan", "a JSON object")
    for key in fields:
        if key not in KEYS:
            raise UserError(f"{where}: {unknown('key', key, KEYS)}")
    version = fields.get("schema_version", PLAN_SCHEMA_VERSION)
    if type(version) is not int or version != PLAN_SCHEMA_VERSION:
        raise UserError(f"{where}: schema_version {version!r} is not {PLAN_SCHEMA_VERSION}, the one this release reads")
    num_layers = fields.get("num_layers")
    if type(num_layers) is not int or num_layers < 1:
        raise UserError(f"{where}: num_layers must be a positive whole number, not {num_layers!r}")
    optional = {key: value for key, value in fields.items() if value is not None}
    plan = PrunePlan(
        num_layers=num_layers,
        kept=_kept(fields, num_layers, where),
        source=_identity(fields.get("source"), where),
        revision=_typed(optional.get("revision"), (str, type(None)), where, "revision", "a text"),
        segments=_segments(optional.get("segments", []), num_layers, where),
        scores=_scores(optional.get("scores", {}), num_layers, where),
        budget=_typed(optional.get("budget", {}), dict, where, "budget", "an object"),
        settings=_typed(optional.get("settings", {}), dict, where, "settings", "an object"),
        versions=_typed(optional.get("versions", {}), dict, where, "versions", "an object"),
    )
    return _checked(plan, where)


def _kept(data: Mapping[str, Any], num_layers: int, where: str) -> tuple[int, ...]:
    given = {
        key: _checked_indices(data[key], num_layers, f"{where}: {key}") for key in ("kept", "removed") if key in data
    }
    if not given:
        raise UserError(f"{where}: a plan needs one of 'kept' and 'removed'")
    everything = set(range(num_layers))
    kept = given["kept"] if "kept" in given else everything - given["removed"]
    if "removed" in given and kept != everything - given["removed"]:
        raise UserError(f"{where}: 'kept' and 'removed' contradict each other; give one of them")
    return tuple(sorted(kept))


def _checked_indices(value: object, num_layers: int, where: str) -> set[int]:
    if not isinstance(value, list) or any(type(layer) is not int for layer in value):
        raise UserError(f"{where}: expected a list of whole numbers, not {value!r}")
    for layer in value:
        if not 0 <= layer < num_layers:
            raise UserError(f"{where}: layer {layer} is not in 0..{num_layers - 1}")
    if len(set(value)) != len(value):
        raise UserError(f"{where}: a layer stands in the list twice: {value}")
    return set(value)


def _checked(plan: PrunePlan, where: str) -> PrunePlan:
    if not plan.kept:
        raise UserError(f"{where}: all {plan.num_layers} layers would be removed; at least one must stay")
    if not plan.removed:
        raise UserError(f"{where}: no layer would be removed")
    return plan


def _identity(value: object, where: str) -> ModelIdentity | None:
    if value is None:
        return None
    fields = _typed(value, dict, where, "source", "an object with name, model_type and fingerprint")
    if set(fields) != {"name", "model_type", "fingerprint"} or any(type(text) is not str for text in fields.values()):
        raise UserError(
            f"{where}: source must have exactly the texts name, model_type and fingerprint; leave it out if unknown"
        )
    return ModelIdentity(**fields)


def _segments(value: object, num_layers: int, where: str) -> tuple[Segment, ...]:
    pairs = _typed(value, list, where, "segments", "a list of [start, stop] pairs")
    if any(not isinstance(pair, list) or len(pair) != 2 or any(type(end) is not int for end in pair) for pair in pairs):
        raise UserError(f"{where}: segments must be a list of [start, stop] pairs, half open")
    segments = tuple(Segment(start, stop) for start, stop in pairs)
    bounds = [0, *(segment.stop for segment in segments)]
    if segments and (
        [segment.start for segment in segments] != bounds[:-1]
        or bounds != sorted(set(bounds))
        or bounds[-1] != num_layers
    ):
        raise UserError(f"{where}: segments must cover 0..{num_layers} without gaps, in order")
    return segments


def _scores(value: object, num_layers: int, where: str) -> dict[str, tuple[float, ...]]:
    scores = _typed(value, dict, where, "scores", "an object of lists")
    for name, values in scores.items():
        if (
            not isinstance(values, list)
            or len(values) != num_layers
            or not all(type(x) in (int, float) and abs(x) <= sys.float_info.max for x in values)  # NaN is not
        ):
            raise UserError(f"{where}: scores.{name} must be a list of {num_layers} numbers")
    return {name: tuple(float(x) for x in values) for name, values in scores.items()}


def _typed(value: object, kind: type | tuple[type, ...], where: str, name: str, expected: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"{where}: {name} must be {expected}, not {type(value).__name__}")
    return value
