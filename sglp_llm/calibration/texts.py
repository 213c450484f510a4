"""A specification such as ``wikitext2`` or ``text:FILE`` -> documents. The only module that imports `datasets`."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from sglp_llm.errors import UserError, unknown
from sglp_llm.models.hub import offline_when_unreachable

Split = Literal["train", "test"]

FILE_FORMS = ("text:FILE", "jsonl:FILE:FIELD")

BYTE_ORDER_MARK = "\ufeff"

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
        documents = _NAMED[source.name](source.split or split)
    elif source.field is None:
        documents = _text_file(source.path)
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
        with _opened(source.path) as stream:
            if not stream.read(1):
                raise UserError(f"{source.path}: the file is empty")
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
    if name not in _NAMED:
        raise unknown("calibration set", spec, [*_NAMED, *FILE_FORMS])
    for split in get_args(Split):
        if rest == split:
            return _Source(name, split)
    if spec != name:
        raise unknown(f"split of {name}", rest, get_args(Split))
    return _Source(name)


@contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
    """The file's bytes, decompressed; an error while the block reads them becomes a `UserError`."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged, or not a gzip file ({error})") from None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: this is a folder, not a file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the file ({error.strerror or error})") from None


def _text_file(path: Path) -> Iterator[str]:
    with _opened(path) as stream:
        data = stream.read()
    try:
        text = data.decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    # The same text gives the same sequences whatever its line endings.
    yield text.replace("\r\n", "\n")


def _jsonl_file(path: Path, field: str) -> Iterator[str]:
    empty = True
    with _opened(path) as stream:
        for number, line in enumerate(stream, start=1):
            text = _field_of_line(line, field, f"{path}, line {number}") if line.strip() else ""
            empty = empty and not text.strip()
            yield text
    if empty:
        raise UserError(f"{path}: the file is empty, or every {field!r} in it is")


def _field_of_line(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(line.decode().removeprefix(BYTE_ORDER_MARK).rstrip())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text: byte 0x{line[error.start]:02x} at position {error.start}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, not {type(row).__name__}")
    if field not in row:
        raise UserError(f"{where}: there is no field {field!r}; the fields are {', '.join(map(repr, row)) or 'none'}")
    value = row[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: field {field!r} holds half of a surrogate pair, which is not text") from None
    return value


def _pydoc(split: Split) -> Iterator[str]:
    from pydoc_data.topics import topics

    return _part((topics[name] for name in sorted(topics)), 5, split)


def _wikitext2(split: Split) -> Iterator[str]:
    rows = _hub_rows("wikitext2", "Salesforce/wikitext", ["text"], name="wikitext-2-raw-v1", split=split)
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
    rows = _hub_rows("c4", "allenai/c4", ["text"], data_files={split: shard}, split=split, streaming=True)
    return (row["text"] for row in rows)


def _alpaca(split: Split) -> Iterator[str]:
    rows = _hub_rows("alpaca", "yahma/alpaca-cleaned", ["instruction", "input", "output"], split="train")
    texts = ((ALPACA_WITH_INPUT if row["input"] else ALPACA_WITHOUT_INPUT).format(**row) for row in rows)
    return _part(texts, 10, split)


def _bookcorpus(split: Split) -> Iterator[str]:
    # A Parquet copy: the original, bookcorpus/bookcorpus, is a script, which datasets has not run since version 4.
    rows = _hub_rows("bookcorpus", "rojagtap/bookcorpus", ["text"], split="train", streaming=True)
    sentences = (row["text"] for row in rows)
    return _part(iter(lambda: " ".join(islice(sentences, BOOK_SENTENCES)), ""), 10, split)


_NAMED: dict[str, Callable[[Split], Iterator[str]]] = {
    "alpaca": _alpaca,
    "bookcorpus": _bookcorpus,
    "c4": _c4,
    "pydoc": _pydoc,
    "wikitext2": _wikitext2,
}


def _part(documents: Iterable[str], period: int, split: Split) -> Iterator[str]:
    """Every ``period``-th document for ``test``, all others for ``train``."""
    return (text for number, text in enumerate(documents, 1) if (number % period == 0) == (split == "test"))


def _hub_rows(source: str, path: str, columns: list[str], **arguments: Any) -> Iterator[dict[str, str]]:
    """Rows of a data set on the Hugging Face Hub, or of its local cache, with the given columns only."""
    import datasets

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
