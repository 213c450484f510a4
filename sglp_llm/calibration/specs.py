"""The specification of one source, parsed: ``wikitext2:test``, ``text:FILE``, ``jsonl:FILE:FIELD``, ``chat:FILE`` or ``self``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from sglp_llm.calibration.corpora import CORPORA, Split
from sglp_llm.errors import UserError, unknown

SELF = "self"
"""The source that is text written by the model itself."""

SELF_FIELD = "text"
"""The field of a JSONL file that holds such text, one document per line."""

FILE_FORMS = {"text": "text:FILE", "jsonl": "jsonl:FILE:FIELD", "chat": "chat:FILE"}
"""The forms of file sources, by their first word."""


@dataclass(frozen=True)
class Source:
    """A parsed specification.

    Attributes:
        name: A corpus, a key of `FILE_FORMS`, or `SELF`.
        split: The split that the specification names, if any.
        path: The file of a file source.
        field: The field that holds the text; ``jsonl`` only.
    """

    name: str
    split: Split | None = None
    path: Path | None = None
    field: str | None = None

    def label(self, split: Split) -> str:
        """The name of a corpus as shown in results: with its split, by default the given one."""
        assert self.name in CORPORA
        return f"{self.name}:{self.split or split}"


def parse_source(spec: str) -> Source:
    """Parses the specification of one source; reads nothing.

    Raises:
        UserError: The name is unknown, or the form is incomplete.
    """
    name, _, rest = spec.partition(":")
    if name == "jsonl":
        file, _, field = rest.rpartition(":")
        if not file or not field:
            raise UserError(f"{spec!r} does not name a file and a field; write {FILE_FORMS[name]}")
        return Source(name, path=Path(file).expanduser(), field=field)
    if name in FILE_FORMS:
        if not rest:
            raise UserError(f"{spec!r} names no file; write {FILE_FORMS[name]}")
        return Source(name, path=Path(rest).expanduser())
    if not is_source_name(name):
        raise unknown("calibration set", spec, [*CORPORA, *FILE_FORMS.values(), SELF])
    if spec == name:
        return Source(name)
    if name == SELF:
        raise UserError(f"{spec!r}: what the model writes itself has no splits; write {SELF}")
    for split in get_args(Split):
        if rest == split:
            return Source(name, split)
    raise unknown(f"split of {name}", rest, get_args(Split))


def is_source_name(name: str) -> bool:
    """Whether this is the first word of a source's specification."""
    return name in CORPORA or name in FILE_FORMS or name == SELF
