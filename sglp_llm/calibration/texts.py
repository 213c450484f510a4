"""A specification such as ``wikitext2`` or ``text:FILE`` -> documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sglp_llm.calibration.chat import conversations, render
from sglp_llm.calibration.corpora import CORPORA, Split
from sglp_llm.calibration.files import check_not_empty, json_lines, text_field, whole_text
from sglp_llm.calibration.mixtures import Spec, mixture
from sglp_llm.calibration.specs import SELF, SELF_FIELD, parse_source
from sglp_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_documents(
    spec: str,
    split: Split,
    tokenizer: PreTrainedTokenizerBase | None = None,
    self_file: Path | None = None,
    enough: int | None = None,
) -> Iterator[str]:
    """The documents of one source in the source's order, read lazily; blank ones are left out.

    ==================  ===========================================  ==========================  ======================
    specification       one document                                 train                       test
    ==================  ===========================================  ==========================  ======================
    wikitext2           an article of WikiText-2 (raw)               its train split             its test split
    wikitext103         an article of WikiText-103 (raw)             its train split             its test split
    c4                  a web page of C4 (en)                        first shard of train        first of validation
    alpaca              a row of Alpaca (cleaned) in its prompt      the rest                    every tenth row
    bookcorpus          128 consecutive sentences                    the rest                    every tenth document
    fineweb-edu         a web page of FineWeb-Edu (10BT sample)      the rest                    every hundredth page
    pydoc               a topic of the Python installation's help    the rest                    every fifth topic
    text:FILE           the whole file                               no split                    no split
    jsonl:FILE:FIELD    the field's value in one line's object       no split                    no split
    chat:FILE           the conversation in one line's object        no split                    no split
    self                text that a model wrote, see `self_text`     no split                    no split
    ==================  ===========================================  ==========================  ======================

    Files are UTF-8, plain or, where the name ends in ``.gz``, compressed. What ``pydoc`` holds depends on the Python
    version. The articles of wikitext2, joined by blank lines, are exactly its rows joined by blank lines, which is the
    text that published perplexities are measured on.

    Args:
        spec: One of the above; ``:train`` or ``:test`` after a name without FILE overrides ``split``.
        split: Which part of a source that has two.
        tokenizer: Renders the conversations of ``chat:FILE``; ``None`` means Alpaca's prompt.
        self_file: The file for ``self``; without it, ``self`` cannot be read.
        enough: Bytes of a ``text:FILE`` after which it is read no further; ``None`` means all of it.

    Raises:
        UserError: The specification is wrong; while iterating: the text cannot be read.
    """
    source = parse_source(spec)
    documents: Iterator[str]
    if source.name == SELF:
        if self_file is None:
            raise UserError(f"{SELF} is text that a model writes, and no model writes text here; name another source")
        documents = _jsonl_file(self_file, SELF_FIELD)
    elif source.name == "chat":
        documents = (render(tokenizer, conversation).text for conversation in conversations(source, split))
    elif source.path is None:
        documents = CORPORA[source.name](source.split or split)
    elif source.field is None:
        documents = (whole_text(path, enough) for path in [source.path])
    else:
        documents = _jsonl_file(source.path, source.field)
    return (document for document in documents if document.strip())


def check_spec(spec: Spec) -> None:
    """Finds the mistakes in a specification that can be found without reading everything or contacting the Hub.

    Raises:
        UserError: The form is wrong, or a file is missing, unreadable, empty, or wrong in its first line.
    """
    for portion in mixture(spec):
        source = parse_source(portion.source)
        if source.name == "text":
            assert source.path is not None
            check_not_empty(source.path)
        elif source.name == "chat":
            next(conversations(source, "train"))
        elif source.path is not None:
            next(load_documents(portion.source, "train"))


def source_label(spec: Spec, split: Split) -> str:
    """The specification as shown in results: with the split that was read, where there are splits, and weights other than 1."""
    portions = mixture(spec)
    labels = []
    for portion in portions:
        source = parse_source(portion.source)
        label = source.label(split) if source.name in CORPORA else portion.source
        labels.append(label if portion.weight == 1 or len(portions) == 1 else f"{label}:{portion.weight}")
    return " ".join(labels)


def _jsonl_file(path: Path, field: str) -> Iterator[str]:
    empty = True
    for where, row in json_lines(path):
        text = text_field(row, field, where)
        empty = empty and not text.strip()
        yield text
    if empty:
        raise UserError(f"{path}: the file is empty, or every {field!r} in it is")
