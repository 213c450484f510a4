"""The fields of a plan, each checked and made of decoded JSON."""

from __future__ import annotations

import sys
from typing import Any

from sglp_llm.errors import UserError
from sglp_llm.records import Footprint, ModelIdentity, Segment, SimilarityMatrix

MOST_LAYERS = 10_000
"""The deepest model that a plan can be for; the deepest ones that are published have some hundred decoder layers."""


def checked_indices(value: object, num_layers: int, where: str) -> set[int]:
    """Layer indices, each in ``0..num_layers - 1`` and given once.

    Raises:
        UserError: They are not.
    """
    if not isinstance(value, list) or any(type(layer) is not int for layer in value):
        raise UserError(f"{where}: expected a list of whole numbers, not {value!r}")
    for layer in value:
        if not 0 <= layer < num_layers:
            raise UserError(f"{where}: layer {layer} is not in 0..{num_layers - 1}")
    if len(set(value)) != len(value):
        raise UserError(f"{where}: a layer stands in the list twice: {value}")
    return set(value)


def identity_of(value: object, where: str) -> ModelIdentity | None:
    """`PrunePlan.source`.

    Raises:
        UserError: It is not three texts.
    """
    if value is None:
        return None
    fields = typed(value, dict, where, "source", "an object with name, model_type and fingerprint")
    if set(fields) != {"name", "model_type", "fingerprint"} or any(type(text) is not str for text in fields.values()):
        raise UserError(
            f"{where}: source must have exactly the texts name, model_type and fingerprint; leave it out if unknown"
        )
    return ModelIdentity(**fields)


def segments_of(value: object, num_layers: int, where: str) -> tuple[Segment, ...]:
    """`PrunePlan.segments`, from pairs ``[start, stop]``.

    Raises:
        UserError: They are not a partition of the layers.
    """
    pairs = typed(value, list, where, "segments", "a list of [start, stop] pairs")
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


def scores_of(value: object, num_layers: int, where: str) -> dict[str, tuple[float, ...]]:
    """`PrunePlan.scores`.

    Raises:
        UserError: They are not lists of one finite number per layer.
    """
    scores = typed(value, dict, where, "scores", "an object of lists")
    for name, values in scores.items():
        if not _are_numbers(values, num_layers):
            raise UserError(f"{where}: scores.{name} must be a list of {num_layers} numbers")
    return {name: tuple(float(x) for x in values) for name, values in scores.items()}


def similarity_of(value: object, num_layers: int, where: str) -> SimilarityMatrix | None:
    """`PrunePlan.similarity`, from the kernel's name and the rows of the matrix.

    Raises:
        UserError: It is not a matrix of one finite number for every pair of layers.
    """
    if value is None:
        return None
    fields = typed(value, dict, where, "similarity", "an object with kernel and values")
    if set(fields) != {"kernel", "values"} or not isinstance(fields["kernel"], str):
        raise UserError(f"{where}: similarity must have exactly the text kernel and the rows values")
    rows = fields["values"]
    if not isinstance(rows, list) or len(rows) != num_layers or not all(_are_numbers(row, num_layers) for row in rows):
        raise UserError(f"{where}: similarity.values must be {num_layers} lists of {num_layers} numbers")
    import torch

    return SimilarityMatrix(torch.tensor(rows, dtype=torch.float64), fields["kernel"])


def footprint_of(value: object, num_layers: int, where: str) -> Footprint | None:
    """`PrunePlan.footprint`, from its fields.

    Raises:
        UserError: A field is unknown or missing, or not a count, or a list has not one count for each layer.
    """
    if value is None:
        return None
    names = ("itemsize", "outside", "layers", "cached", "cached_tokens", "positions")
    fields = typed(value, dict, where, "footprint", f"an object with {', '.join(names)}")
    if set(fields) != set(names):
        raise UserError(f"{where}: footprint must have exactly {', '.join(names)}")
    for name, fits in (("itemsize", _is_count), ("outside", _is_count), ("positions", _is_limit)):
        if not fits(fields[name]):
            raise UserError(f"{where}: footprint.{name} must be a whole number, not {fields[name]!r}")
    for name, fits in (("layers", _is_count), ("cached", _is_count), ("cached_tokens", _is_limit)):
        given = fields[name]
        if not isinstance(given, list) or len(given) != num_layers or not all(map(fits, given)):
            raise UserError(f"{where}: footprint.{name} must be a list of {num_layers} whole numbers")
        fields = {**fields, name: tuple(given)}
    return Footprint(**fields)


def typed(value: object, kind: type | tuple[type, ...], where: str, name: str, expected: str) -> Any:
    """The value, if it is of that type.

    Raises:
        UserError: It is of another type.
    """
    if not isinstance(value, kind):
        raise UserError(f"{where}: {name} must be {expected}, not {type(value).__name__}")
    return value


def _are_numbers(values: object, count: int) -> bool:
    """Whether it is a list of so many finite numbers."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(x) in (int, float) and abs(x) <= sys.float_info.max for x in values)  # NaN is not
    )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_limit(value: object) -> bool:
    return value is None or _is_count(value)
