"""What the Hub's check of a model card's metadata refuses; written from its documentation, not from the program's code."""

from __future__ import annotations

import re
from typing import Any

import yaml

_ID = r"[\w.-]{1,96}(/[\w.-]{1,96})?"
# Of https://huggingface.co/docs/hub/repositories-licenses, those that the tests use.
_LICENSES = {"apache-2.0", "mit", "llama3.2", "gemma", "other"}
_RELATIONS = {"adapter", "finetune", "merge", "quantized"}


def metadata_errors(card: str) -> list[str]:
    """One line for each mistake in the YAML at the top of a card."""
    found = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", card, re.DOTALL)
    if found is None:
        return []
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    errors = [f'"{key}" must be {rule}' for key, (rule, fits) in _RULES.items() if key in data and not fits(data[key])]
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is needed with "license: other"')
    return errors + [
        f"model-index: {error}" for model in _listed(data.get("model-index")) for error in _index_errors(model)
    ]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _all(pattern: str) -> Any:
    return lambda value: all(isinstance(each, str) and re.fullmatch(pattern, each) for each in _listed(value))


_RULES: dict[str, tuple[str, Any]] = {
    "base_model": ("the id of a model, or several", _all(_ID)),
    "base_model_relation": ("a known relation", lambda value: value in _RELATIONS),
    "datasets": ("ids of data sets", _all(_ID)),
    "language": ("ISO 639 codes", _all("[a-z]{2,3}|code|multilingual")),
    "license": ("a known license", lambda value: value in _LICENSES),
    "library_name": ("a text", _all(r"[\w-]+")),
    "pipeline_tag": ("a task", _all("text-generation")),
    "tags": ("texts", lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value)),
}


def _index_errors(model: Any) -> list[str]:
    if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not model.get("results"):
        return ["a model needs a name and results"]
    errors = []
    for result in model["results"]:
        if not isinstance(result.get("task", {}).get("type"), str):
            errors.append("a result needs a task with a type")
        data_set = result.get("dataset", {})
        if not all(isinstance(data_set.get(key), str) for key in ("type", "name")):
            errors.append("a result needs a data set with a type and a name")
        metrics = result.get("metrics")
        if not metrics or any("value" not in each or not isinstance(each.get("type"), str) for each in metrics):
            errors.append("a result needs metrics with a type and a value")
    return errors
