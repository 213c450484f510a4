"""YAML files that come with the package: recipes, presets and suites, each by its file's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglp_llm.errors import unknown
from sglp_llm.plan.yaml_files import parse_yaml

_PACKAGE = Path(__file__).parents[1]
_PRESETS = Path(__file__).parent / "presets"
_OLD_NAMES = {"sglp": "paper"}

DEFAULT_PRESET = "fast"
"""The preset of a run that does not say how layers are chosen or compensated for."""

UNTRAINED_PRESET = "closed-form"
"""`DEFAULT_PRESET` without its training."""

UNCHANGED_PRESET = "paper"
"""The preset for an output that keeps the weights of the kept layers as they are."""


def shipped_recipes() -> dict[str, Path]:
    """The recipes' files by name, sorted."""
    return _yaml_files(_shipped_folder("recipes"))


def shipped_healing_recipes() -> dict[str, Path]:
    """The healing recipes' files by name, sorted."""
    return _yaml_files(_shipped_folder("recipes") / "heal")


def shipped_suites() -> dict[str, Path]:
    """The files of the suites of lm-eval tasks by name, sorted."""
    return _yaml_files(_shipped_folder("eval"))


def preset_settings(name: str | None) -> dict[str, Any]:
    """The settings of a preset, for `Recipe.with_changes`: how layers are chosen and compensated for; it names no model.

    Args:
        name: One of `preset_names`, or an old name of one; ``None`` means none, which sets nothing.

    Raises:
        UserError: There is none of that name; the message lists the known ones and the nearest name.
    """
    if name is None:
        return {}
    shipped = _yaml_files(_PRESETS)
    name = _OLD_NAMES.get(name, name)
    if name not in shipped:
        raise unknown("preset", name, shipped)
    settings = parse_yaml(shipped[name].read_text(encoding="utf-8"), name)
    assert isinstance(settings, dict)
    return settings


def preset_or_default(name: str | None, settings: Mapping[str, Any], default: str = DEFAULT_PRESET) -> str | None:
    """The preset of a run without a recipe and without a plan.

    Args:
        name: The preset that was asked for, if any.
        settings: The single settings that were given, ``None`` where one was not. One that names a criterion or a compensation
            says how layers are chosen, so that no preset is needed.
        default: The preset where nothing says how.
    """
    if name is not None or any(settings.get(key) is not None for key in ("criterion", "compensate")):
        return name
    return default


def preset_description(name: str) -> str:
    """The comment in the first line of a preset's file."""
    return str(_yaml_files(_PRESETS)[name].read_text(encoding="utf-8").split("\n")[0].removeprefix("# "))


def preset_names() -> list[str]:
    """The presets, sorted."""
    return list(_yaml_files(_PRESETS))


def _yaml_files(folder: Path) -> dict[str, Path]:
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _shipped_folder(name: str) -> Path:
    """A folder that is at the top of the repository, but inside the package in a wheel."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
