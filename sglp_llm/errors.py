"""The error for mistakes that the user can correct, and what makes one of a disk that takes nothing more."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

_REFUSING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What the system says where nothing more can be written."""

# Libraries in other languages raise errors of their own, which carry no number.
_REFUSING_WORDS = {
    "No space left on device": "No space left on device",
    "Disk quota exceeded": "Disk quota exceeded",
    "File too large": "File too large",
    "Read-only file system": "Read-only file system",
    "PytorchStreamWriter failed": "PyTorch cannot write its file",
    "iostream error": "PyTorch cannot write its file",
    "unexpected pos": "PyTorch cannot write its file",
}

MOST_CHARACTERS = 280
"""The longest message; what comes from files and options may have any length, and would fill a screen."""

_KEPT_AT_THE_END = 110
_MOST_OF_A_COMMAND = 1000


class UserError(ValueError):
    """A mistake in the user's input. The message is one line: what is wrong, where, what would be right."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a list of known names; it suggests the nearest one and shows the list.

    Args:
        kind: What the name denotes, for example ``"criterion"``.
        name: What the user wrote.
        known: Every valid name.
    """
    names, name = sorted(known), str(name)
    near = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    suggestion = f"; did you mean {near[0]!r}?" if near else "."
    return UserError(f"unknown {kind} {name!r}{suggestion} Known: {', '.join(names)}")


def is_failure(error: BaseException) -> bool:
    """Whether it is an `Exception`, or the panic of a library in Rust, which is none; not an interruption or an exit."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def one_line(message: str) -> str:
    """The message as one line of at most `MOST_CHARACTERS`, without what a terminal would take for a command.

    Its beginning says what is wrong, and its end what would be right: the middle of a longer one is left out. A command at the
    end, which is there to be copied, is kept whole unless it has more than `_MOST_OF_A_COMMAND` characters.
    """
    text = " ".join(message.split())
    if not text.isprintable():
        text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    if len(text) <= MOST_CHARACTERS:
        return text
    before, colon, command = text.rpartition(": sglp-llm ")
    if colon and len(command) <= _MOST_OF_A_COMMAND:
        return f"{one_line(before)}{colon}{command}"
    return f"{text[: MOST_CHARACTERS - _KEPT_AT_THE_END - 5]} ... {text[-_KEPT_AT_THE_END:]}"


@contextmanager
def disk_of(place: Path) -> Iterator[None]:
    """Inside the block a disk that is full or read-only is the user's matter, whichever library finds out.

    Args:
        place: What is written there, for the message.

    Raises:
        UserError: Nothing more can be written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if reason := _refusal(error):
            raise UserError(f"{place}: cannot be written: {reason}; make room, or choose another disk") from error
        raise


def _refusal(error: BaseException | None) -> str | None:
    """Why the disk refused, where that is at the root of an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REFUSING:
            return error.strerror
        if found := [reason for words, reason in _REFUSING_WORDS.items() if words in str(error)]:
            return found[0]
        error = error.__cause__ or error.__context__
    return None
