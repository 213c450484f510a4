"""Mixtures of several sources, each with a weight: ``"wikitext2:1 c4:1 self:2"``."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate
from math import lcm

from sglp_llm.calibration.specs import FILE_FORMS, is_source_name, parse_source
from sglp_llm.errors import UserError
from sglp_llm.method.selection import spread


@dataclass(frozen=True)
class Portion:
    """One source of a mixture.

    Attributes:
        source: The specification of the source, without its weight.
        weight: Positive; shares are proportional to the weights.
    """

    source: str
    weight: Decimal = Decimal(1)


Spec = str | Sequence[Portion]
"""A specification as a string, or parsed by `mixture`."""


def mixture(spec: Spec) -> tuple[Portion, ...]:
    """Parses a specification: one source or several, separated by spaces, each optionally followed by ``:WEIGHT``.

    A weight is a number such as ``2`` or ``0.5``; the default is 1. If a file exists whose name ends in ``:NUMBER``, the number
    is part of the name and not a weight. File names in a mixture of several sources cannot contain spaces; the name of a
    single file can.

    Args:
        spec: The specification; a parsed mixture is returned unchanged.

    Returns:
        At least one portion.

    Raises:
        UserError: A source is unknown or named twice, or a weight is 0.
    """
    if not isinstance(spec, str):
        return tuple(spec)
    portions = tuple(map(_portion, [spec] if _is_one(spec) else spec.split()))
    sources = [parse_source(portion.source) for portion in portions]
    read = [replace(source, split=source.split or "train") for source in sources]  # a mixture's default
    for number, portion in enumerate(portions):
        if read[number] in read[:number]:
            raise UserError(f"{spec!r} names {portion.source} twice; give it one weight, such as {portion.source}:2")
    return portions


def shares(portions: Sequence[Portion], total: int) -> list[int]:
    """Shares ``total`` sequences in proportion to the weights, by largest remainder; a share may be 0."""
    weights = [Fraction(portion.weight) for portion in portions]
    scale = lcm(*(weight.denominator for weight in weights))
    return spread(total, [int(weight * scale) for weight in weights])


def interleaved(counts: Sequence[int], seed: int) -> list[int]:
    """Interleaves the sequences of several sources at random; the order within each source does not change.

    Args:
        counts: Number of sequences of each source.
        seed: Seed of the order.

    Returns:
        A permutation of the concatenated sequences: for each new position, the old one. The identity for a single source.
    """
    order = [source for source, count in enumerate(counts) for _ in range(count)]
    random.Random(seed).shuffle(order)
    following = [0, *accumulate(counts)]
    places = []
    for source in order:
        places.append(following[source])
        following[source] += 1
    return places


def _is_one(spec: str) -> bool:
    """Whether spaces belong to a file name: the file exists, or the words after them are not sources."""
    if spec.partition(":")[0] not in FILE_FORMS:
        return not spec.strip()
    return _is_file(spec) or not all(is_source_name(part.partition(":")[0]) for part in spec.split())


def _portion(part: str) -> Portion:
    match = re.fullmatch(r"(.+):([0-9]+(?:\.[0-9]+)?)", part, re.DOTALL)
    # jsonl:FILE:2 reads the field "2".
    if match is None or _is_file(part) or (part.startswith("jsonl:") and match[1].count(":") < 2):
        return Portion(part)
    weight = Decimal(match[2])
    if not weight:
        raise UserError(f"{part!r}: a weight must be positive; leave the source out instead")
    return Portion(match[1], weight)


def _is_file(spec: str) -> bool:
    """Whether this, taken as the specification of one source, names an existing file."""
    try:
        path = parse_source(spec).path
        return path is not None and path.exists()
    except (UserError, OSError):  # a form that is incomplete; a name that is too long for a file
        return False
