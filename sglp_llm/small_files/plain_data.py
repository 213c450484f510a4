"""Decoded JSON and YAML: bounds on what it may hold, checked before anything is made of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

MOST_NESTING = 64
"""Lists and objects inside one another."""

MOST_CONTAINERS = 1_000_000
"""Lists and objects, each counted as often as it is reached: a few aliases in a YAML file may stand for billions."""

MOST_DIGITS = 40
"""Digits of a whole number: transformers writes 10**30 for a length without a limit."""

_LARGEST = 10**MOST_DIGITS


def decoded_json(text: str) -> Any:
    """The plain data of a JSON text.

    Raises:
        ValueError: It is not JSON, or `checked_data` refuses it. The message is one short line.
    """
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python's own limit
        raise ValueError(f"a number of more than {MOST_DIGITS} digits") from None
    return checked_data(data)


def checked_data(data: Any, texts: bool = True) -> Any:
    """The same data.

    Args:
        data: Decoded JSON or YAML.
        texts: Whether texts are checked too.

    Raises:
        ValueError: Nested too deeply, or in itself; too many lists and objects; a number of too many digits; or a text that is
            none in UTF-8.
    """
    level: list[Any] = [data]
    count = 0
    for _ in range(MOST_NESTING + 1):
        containers = [each for each in level if isinstance(each, Mapping | list | tuple)]
        if not containers:
            return data
        level = list(islice(_inside(containers, texts), MOST_CONTAINERS + 1 - count))
        count += len(level)
        if count > MOST_CONTAINERS:
            raise ValueError(f"more than {MOST_CONTAINERS} parts")
    raise ValueError(f"nested too deeply, more than {MOST_NESTING} times")


def _inside(containers: Iterable[Mapping[Any, Any] | Sequence[Any]], texts: bool) -> Iterator[Any]:
    """What is to be looked at one level deeper: the containers. Numbers and texts are checked on the way."""
    for each in chain.from_iterable(
        chain(each.keys(), each.values()) if isinstance(each, Mapping) else each for each in containers
    ):
        if isinstance(each, str):
            if texts and not each.isascii():
                _check_text(each)
        elif isinstance(each, Mapping | list | tuple):
            yield each
        elif type(each) is int and not -_LARGEST < each < _LARGEST:
            raise ValueError(f"a number of more than {MOST_DIGITS} digits")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is not text") from None
