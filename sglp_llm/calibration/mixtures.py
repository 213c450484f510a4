"""Several sources at once, each with a weight: ``"wikitext2:1 c4:1 self:2"``."""

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
        source: Its specification, without a weight.
        weight: Its share is in proportion to this, which is positive.
    """

    source: str
    weight: Decimal = Decimal(1)


Spec = str | Sequence[Portion]
"""A specification as it is written, or what `mixture` made of it."""


def mixture(spec: Spec) -> tuple[Portion, ...]:
    """The sources that a specification names, separated by spaces, each with what stands behind its last colon as its weight.

    A weight is a number such as ``2`` or ``0.5``; without one it is 1. What could be a weight or the end of a file's name is
    the name where there is such a file. The name of a file in a mixture of several sources cannot have spaces in it; the one
    file that makes a specification alone can.

    Args:
        spec: The specification; a mixture that was taken apart already is given back.

    Returns:
        One portion or more.

    Raises:
        UserError: A source is unknown, a weight is 0, or a source stands there twice.
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
    """How many of ``total`` equal things come from each source: by weight, by largest remainder; some may get none."""
    weights = [Fraction(portion.weight) for portion in portions]
    scale = lcm(*(weight.denominator for weight in weights))
    return spread(total, [int(weight * scale) for weight in weights])


def interleaved(counts: Sequence[int], seed: int) -> list[int]:
    """A seeded random order of the sources, in which the things of each one keep their own order.

    Args:
        counts: How many things each source has.
        seed: Of the order.

    Returns:
        For every place in the new order, the number of the thing that comes there, where before the sources stood one behind
        the other. One source alone stays as it is.
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
    """Whether spaces belong to the name of a file: there is such a file, or what follows them is no source."""
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
    """Whether the specification as it stands is that of a file which is there."""
    try:
        path = parse_source(spec).path
        return path is not None and path.exists()
    except (UserError, OSError):  # a form that is incomplete; a name that is too long for a file
        return False
