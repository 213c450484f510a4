"""Returns a model family's adapter, which describes the family. Start with `base.py`, then `llama.py`.

One file per family, named after transformers' ``config.model_type``. A new family is one new file with an
`ADAPTER`; the contract tests pick it up by themselves.
"""

from __future__ import annotations

from sglp_llm.adapters.base import Branch, DecoderAdapter
from sglp_llm.registry import member, member_names

__all__ = ["Branch", "DecoderAdapter", "adapter_names", "get_adapter"]


def adapter_names() -> list[str]:
    """Every ``model_type`` there is an adapter for, sorted."""
    return member_names(__path__)


def get_adapter(model_type: str) -> DecoderAdapter:
    """The adapter of a model family.

    Raises:
        UserError: There is none; the message lists the known families and the nearest name.
    """
    adapter: DecoderAdapter = member(__name__, __path__, model_type, "model family (model_type)").ADAPTER
    return adapter
