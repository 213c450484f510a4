"""The text of a run that names none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import pytest

from sglp_llm.calibration import AUTO, named_text
from sglp_llm.calibration.default_text import _text_at_hand


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    _text_at_hand.cache_clear()
    yield
    _text_at_hand.cache_clear()


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"Salesforce/wikitext", "allenai/c4"}, "wikitext2:1 c4:1"),
        ({"Salesforce/wikitext"}, "wikitext2"),
        ({"allenai/c4"}, "self"),
        (set(), "self"),
    ],
)
def test_the_first_that_can_be_read(there: set[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **_: Any) -> object:
        if path not in there:
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub")
        return datasets.Dataset.from_list([{"text": " = One = \n"}, {"text": " Text . \n"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert named_text(AUTO) == expected


def test_a_text_that_is_named_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(datasets, "load_dataset")
    for spec in ("pydoc", "self", "wikitext2", "wikitext2:1 c4:1"):
        assert named_text(spec) == spec
