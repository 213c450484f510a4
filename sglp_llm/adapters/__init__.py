"""Returns a model family's adapter, which describes the family. Start with `base.py`, then `llama.py`.

A family with a file, named after transformers' ``config.model_type``, is described there. Every other one is described by what
`structure` finds in the configuration and the modules.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from sglp_llm.adapters.base import Branch, DecoderAdapter
from sglp_llm.adapters.structure.wrappers import auto_class, is_wrapper, text_config
from sglp_llm.registry import member, member_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "Branch",
    "ConfigKey",
    "DecoderAdapter",
    "adapter_names",
    "adapter_of",
    "auto_class",
    "get_adapter",
    "is_wrapper",
    "text_config",
]


def adapter_names() -> list[str]:
    """Every ``model_type`` that has a file, sorted."""
    return member_names(__path__)


def get_adapter(model_type: str) -> DecoderAdapter:
    """The adapter of a model family that has a file.

    Raises:
        UserError: There is none; the message lists the known families and the nearest name.
    """
    adapter: DecoderAdapter = member(__name__, __path__, model_type, "model family (model_type)").ADAPTER
    return adapter


def adapter_of(config: PretrainedConfig) -> DecoderAdapter:
    """The adapter of a model: its family's file, or what can be derived from its configuration and its modules.

    Args:
        config: The resolved configuration.

    Raises:
        UserError: Layers of such a model cannot be removed; the message says why.
    """
    if config.model_type in adapter_names():
        return get_adapter(config.model_type)
    return _derived(ConfigKey(config))


class ConfigKey:
    """A configuration as a key of a cache: a derivation builds the whole model without weights."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self._text = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigKey) and self._text == other._text


@lru_cache(maxsize=8)
def _derived(key: ConfigKey) -> DecoderAdapter:
    from sglp_llm.adapters.structure.derive import derive

    return derive(key.config, lambda model_type: get_adapter(model_type) if model_type in adapter_names() else None)
