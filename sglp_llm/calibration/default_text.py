"""The text of a run that names none."""

from __future__ import annotations

from functools import lru_cache

from sglp_llm.calibration.mixtures import mixture
from sglp_llm.calibration.specs import SELF
from sglp_llm.calibration.texts import load_documents
from sglp_llm.errors import UserError

AUTO = "auto"
"""Stands for the text that `named_text` finds."""

_BEST_FIRST = ("wikitext2:1 c4:1", "wikitext2")


def named_text(spec: str) -> str:
    """The specification itself; for ``auto`` the first of these whose text can be had.

    It is WikiText-2 and C4 in equal parts, then WikiText-2 alone, and ``self``, which the model writes, where neither the Hub nor
    its cache has them. What a shortened model learns from two kinds of text carries over to others better than what it learns
    from one.
    """
    return _text_at_hand() if spec == AUTO else spec


@lru_cache(maxsize=1)
def _text_at_hand() -> str:
    return next(filter(_is_there, _BEST_FIRST), SELF)


def _is_there(spec: str) -> bool:
    try:
        return all(next(iter(load_documents(each.source, "train")), None) is not None for each in mixture(spec))
    except UserError:
        return False
