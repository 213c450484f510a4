"""A specification such as ``wikitext2`` or ``text:FILE`` -> documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from sglp_llm.calibration.corpora import CORPORA, Split
from sglp_llm.calibration.files import check_not_empty, json_lines, text_field, whole_text
from sglp_llm.errors import UserError, unknown

FILE_FORMS = ("text:FILE", "jsonl:FILE:FIELD")


def load_documents(spec: str, split: Split) -> Iterator[str]:
    """The documents of a source in the source's order, read lazily; blank ones are left out.

    ==================  ===========================================  ==========================  ======================
    specification       one document                                 train                       test
    ==================  ===========================================  ==========================  ======================
    wikitext2           an article of WikiText-2 (raw)               its train split             its test split
    c4                  a web page of C4 (en)                        first shard of train        first of validation
    alpaca              a row of Alpaca (cleaned) in its prompt      the rest                    every tenth row
    bookcorpus          128 consecutive sentences                    the rest                    every tenth document
    pydoc               a topic of the Python installation's help    the rest                    every fifth topic
    text:FILE           the whole file                               no split                    no split
    jsonl:FILE:FIELD    the field's value in one line's object       no split                    no split
    ==================  ===========================================  ==========================  ======================

    Files are UTF-8, plain or, where the name ends in ``.gz``, compressed. What ``pydoc`` holds depends on the Python
    version. The articles of wikitext2, joined by blank lines, are exactly its rows joined by blank lines, which is the
    text that published perplexities are measured on.

    Args:
        spec: One of the above; ``:train`` or ``:test`` after a name without FILE overrides ``split``.
        split: Which part of a source that has two.

    Raises:
        UserError: The specification is wrong; while iterating: the text cannot be read.
    """
    source = _parse(spec)
    if source.path is None:
        documents = CORPORA[source.name](source.split or split)
    elif source.field is None:
        documents = (whole_text(path) for path in [source.path])
    else:
        documents = _jsonl_file(source.path, source.field)
    return (document for document in documents if document.strip())


def check_spec(spec: str) -> None:
    """Finds the mistakes in a specification that can be found without reading everything or contacting the Hub.

    Raises:
        UserError: The form is wrong, or the file is missing, unreadable, empty, or wrong in its first line.
    """
    source = _parse(spec)
    if source.path is not None and source.field is None:
        check_not_empty(source.path)
    elif source.path is not None:
        next(load_documents(spec, "train"))


def source_label(spec: str, split: Split) -> str:
    """The specification as shown in results: with the split that was read, where there are splits."""
    source = _parse(spec)
    return spec if source.path is not None else f"{source.name}:{source.split or split}"


@dataclass(frozen=True)
class _Source:
    name: str
    split: Split | None = None
    path: Path | None = None
    field: str | None = None


def _parse(spec: str) -> _Source:
    name, _, rest = spec.partition(":")
    if name == "text":
        if not rest:
            raise UserError(f"{spec!r} names no file; write text:FILE")
        return _Source(name, path=Path(rest).expanduser())
    if name == "jsonl":
        file, _, field = rest.rpartition(":")
        if not file or not field:
            raise UserError(f"{spec!r} does not name a file and a field; write jsonl:FILE:FIELD")
        return _Source(name, path=Path(file).expanduser(), field=field)
    if name not in CORPORA:
        raise unknown("calibration set", spec, [*CORPORA, *FILE_FORMS])
    for split in get_args(Split):
        if rest == split:
            return _Source(name, split)
    if spec != name:
        raise unknown(f"split of {name}", rest, get_args(Split))
    return _Source(name)


def _jsonl_file(path: Path, field: str) -> Iterator[str]:
    empty = True
    for where, row in json_lines(path):
        text = text_field(row, field, where)
        empty = empty and not text.strip()
        yield text
    if empty:
        raise UserError(f"{path}: the file is empty, or every {field!r} in it is")
