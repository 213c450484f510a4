"""Whether the files of a model are still those that a run began with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sglp_llm.errors import UserError

# What a run reads in a folder: weights and their index, configurations, tokenizer, chat template.
_READ = ("*.json", "*.safetensors", "pytorch_model*.bin", "*.model", "*.jinja", "*.tiktoken", "vocab.txt", "merges.txt")


@dataclass(frozen=True)
class FileStates:
    """Size and time of the last change of a model's files at one moment.

    Attributes:
        states: By path: bytes, and nanoseconds since the epoch.
    """

    states: Mapping[Path, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> FileStates:
        """The files of a folder that a run reads, or the one file."""
        files = {file for pattern in _READ for file in path.glob(pattern)} if path.is_dir() else {path}
        return cls({file: state for file in sorted(files) if (state := _state(file)) is not None})

    def check(self) -> None:
        """Checks that all of them are as they were.

        Raises:
            UserError: One has changed, or is gone.
        """
        for file, before in self.states.items():
            after = _state(file)
            if after is None:
                raise UserError(
                    f"{file}: was removed while it was in use; nothing is written: restore it, and start again"
                )
            if after != before:
                change = "size" if after[0] != before[0] else "time of the last change"
                raise UserError(
                    f"{file}: was changed while it was in use (another {change}); nothing is written: start again"
                )

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Raises for a change inside the block, at its end or in place of the error that came of it.

        Raises:
            UserError: See `check`.
        """
        try:
            yield
        except Exception as error:
            try:
                self.check()
            except UserError as change:
                raise change from error
            raise
        self.check()


def _state(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
