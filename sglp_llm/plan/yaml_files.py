"""YAML <-> records: a file that people write, checked against the annotations of a dataclass."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from sglp_llm.errors import UserError, unknown
from sglp_llm.small_files import checked_data, read_text

MOST_YAML_BYTES = 2**17
"""The largest YAML file: its parser takes seconds for this much."""


def read_yaml(path: Path, kind: str) -> object:
    """The plain data of a YAML file; None when it is empty.

    Args:
        path: The file.
        kind: What it should be, for the message.

    Raises:
        UserError: It cannot be read, or it is not YAML.
    """
    return parse_yaml(read_text(path, kind, MOST_YAML_BYTES), str(path))


def parse_yaml(text: str, name: str) -> object:
    """The plain data of a YAML text.

    Args:
        text: The text.
        name: Its source, for the message.

    Raises:
        UserError: It is not YAML, or `checked_data` refuses it.
    """
    try:
        return checked_data(yaml.safe_load(text))
    except RecursionError:
        raise UserError(f"{name}: not a YAML file that can be read (nested too deeply)") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # Beside yaml's own: a date or number that does not exist, or a tag on data that it does not fit.
        raise UserError(f"{name}: not a YAML file ({' '.join(str(error).split())})") from None


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML, keys in their order."""
    text: str = yaml.safe_dump(dict(data), sort_keys=False)
    return text


def record_from_dict(cls: type, data: object, where: str) -> Any:
    """Checks plain data against the annotations of a dataclass, and makes one of it.

    Raises:
        UserError: A key is unknown (the message names the nearest one) or missing, or a value has the wrong type.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected 'key: value' lines, not {type(data).__name__}")
    try:
        checked_data(data)  # settings may come from a caller, or from a plan
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise UserError(f"{where}: {unknown('key', str(key), hints)}")
    for field_ in dataclasses.fields(cls):
        if field_.name not in data and field_.default is field_.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: the key {field_.name!r} is missing")
    return cls(**{key: converted(value, hints[key], f"{where}: {key}") for key, value in data.items()})


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def converted(value: object, hint: Any, where: str) -> Any:
    """Checks plain data against an annotation.

    Raises:
        UserError: It is of another type, a number beyond 64 bits, or a text that no file name or setting can be.
    """
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{where} must be a number of at most 64 bits, not one of {len(str(value))} digits")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{where} must be text without zero bytes, not {value!r}")
    return _convert(value, hint, where)


def _convert(value: object, hint: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        cls = typing.cast(type, hint)
        return record_from_dict(cls, vars(value) if isinstance(value, cls) else value, where)
    if hint == tuple[str, ...]:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UserError(f"{where} must be a list of texts, not {value!r}")
    if hint == dict[str, dict[str, Any]]:
        if isinstance(value, Mapping) and all(isinstance(inner, Mapping) for inner in value.values()):
            return {str(name): dict(inner) for name, inner in value.items()}
        raise UserError(f"{where} must be settings by criterion, such as {{angular: {{tokens: all}}}}, not {value!r}")
    if hint == dict[str, str]:
        if isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair):
            return dict(value)
        raise UserError(f"{where} must be 'name: text' lines, not {value!r}")
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    allowed: list[str] = []
    for option in options:
        if typing.get_origin(option) is Literal:
            if any(type(value) is type(word) and value == word for word in typing.get_args(option)):
                return value
            allowed += map(str, typing.get_args(option))
        elif type(value) is option or (option is type(None) and value is None):
            return value
        elif option is float and type(value) is int:
            return float(value)
        elif typing.get_origin(option) is dict and isinstance(value, Mapping):
            return dict(value)
        elif option is not type(None):
            allowed.append(_WORDS.get(option, "settings such as {key: value}"))
    raise UserError(f"{where} must be {' or '.join(allowed)}, not {value!r}")
