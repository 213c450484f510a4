"""The named corpora, such as ``wikitext2``, and their documents. The only module that imports `datasets`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeVar

from sglp_llm.errors import UserError
from sglp_llm.models.hub import offline_when_unreachable

Split = Literal["train", "test"]

BOOK_SENTENCES = 128
"""Consecutive rows of bookcorpus, which are single sentences, that make one document."""

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n{output}"
)

HUB_DATA_SETS = {
    "alpaca": "yahma/alpaca-cleaned",
    # A Parquet copy: the original, bookcorpus/bookcorpus, is a script, which datasets has not run since version 4.
    "bookcorpus": "rojagtap/bookcorpus",
    "c4": "allenai/c4",
    "fineweb-edu": "HuggingFaceFW/fineweb-edu",
    "wikitext2": "Salesforce/wikitext",
    "wikitext103": "Salesforce/wikitext",
}
"""The data sets on the Hub that corpora are read from, by the corpus's name."""

_Document = TypeVar("_Document")

_STREAMED = {"wikitext103": {"streaming": True}}
"""Corpora too large to be downloaded as a whole when their beginning is enough."""


def alpaca_rows(split: Split) -> Iterator[dict[str, str]]:
    """Rows of Alpaca (cleaned) with the keys ``instruction``, ``input`` (may be empty) and ``output``.

    Raises:
        UserError: While iterating: the Hub cannot be read.
    """
    rows = _hub_rows("alpaca", ["instruction", "input", "output"], split="train")
    return _part(rows, 10, split)


def _alpaca(split: Split) -> Iterator[str]:
    for row in alpaca_rows(split):
        yield (ALPACA_WITH_INPUT if row["input"] else ALPACA_WITHOUT_INPUT).format(**row)


def _pydoc(split: Split) -> Iterator[str]:
    from pydoc_data.topics import topics

    return _part((topics[name] for name in sorted(topics)), 5, split)


def _wikitext(source: str, name: str, split: Split) -> Iterator[str]:
    rows = _hub_rows(source, ["text"], name=name, split=split, **_STREAMED.get(source, {}))
    article: list[str] = []
    for row in rows:
        text = row["text"]
        if re.fullmatch(r" = (?!=).*(?<!=) = \n?", text) and any(line.strip() for line in article):
            yield "\n\n".join(article)
            article = []
        article.append(text)
    yield "\n\n".join(article)


def _c4(split: Split) -> Iterator[str]:
    shard = {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}[split]
    rows = _hub_rows("c4", ["text"], data_files={split: shard}, split=split, streaming=True)
    return (row["text"] for row in rows)


def _fineweb_edu(split: Split) -> Iterator[str]:
    rows = _hub_rows("fineweb-edu", ["text"], name="sample-10BT", split="train", streaming=True)
    return _part((row["text"] for row in rows), 100, split)


def _bookcorpus(split: Split) -> Iterator[str]:
    rows = _hub_rows("bookcorpus", ["text"], split="train", streaming=True)
    sentences = (row["text"] for row in rows)
    return _part(iter(lambda: " ".join(islice(sentences, BOOK_SENTENCES)), ""), 10, split)


CORPORA: dict[str, Callable[[Split], Iterator[str]]] = {
    "alpaca": _alpaca,
    "bookcorpus": _bookcorpus,
    "c4": _c4,
    "fineweb-edu": _fineweb_edu,
    "pydoc": _pydoc,
    "wikitext2": partial(_wikitext, "wikitext2", "wikitext-2-raw-v1"),
    "wikitext103": partial(_wikitext, "wikitext103", "wikitext-103-raw-v1"),
}
"""The documents of a split, by the corpus's name."""


def _part(documents: Iterable[_Document], period: int, split: Split) -> Iterator[_Document]:
    """Every ``period``-th document for ``test``, all others for ``train``."""
    return (each for number, each in enumerate(documents, 1) if (number % period == 0) == (split == "test"))


def _hub_rows(source: str, columns: list[str], **arguments: Any) -> Iterator[dict[str, str]]:
    """Rows of a corpus's data set on the Hugging Face Hub, or of its local cache, with the given columns only."""
    import datasets

    path = HUB_DATA_SETS[source]
    try:
        with offline_when_unreachable():
            rows = datasets.load_dataset(path, **arguments)
        for row in rows:
            yield {column: row[column] for column in columns}
    except Exception as error:  # offline, gone, renamed, a broken download: each library has errors of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{source}: cannot read the data set {path} from the Hugging Face Hub ({reason[:300]});"
            " without the Hub use text:FILE, jsonl:FILE:FIELD or pydoc"
        ) from error
