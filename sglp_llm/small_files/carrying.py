"""Copies the files that a checkpoint carries beside its weights: no code, and nothing from outside its folder."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sglp_llm.errors import UserError
from sglp_llm.small_files.reading import open_regular, read_json

MOST_CARRIED_BYTES = 2**28
"""The largest of these files: tokenizers have some 30 MB."""

_CODE = {".py", ".pyc", ".pyo", ".pyd", ".so", ".pkl", ".pickle"}
_TOKENIZER_CONFIG = "tokenizer_config.json"
_CODE_KEY = "auto_map"


@dataclass(frozen=True)
class Carried:
    """A file to copy.

    Attributes:
        name: Its path in the checkpoint's folder, and in the copy's.
        file: Where it is.
    """

    name: Path
    file: Path


def carried_files(folder: Path, patterns: Iterable[str]) -> list[Carried]:
    """The files of a checkpoint that match, those in matching folders too; code (``*.py``, pickles) is left out.

    Args:
        folder: The checkpoint's.
        patterns: Of `Path.glob`.

    Raises:
        UserError: One is no regular file inside the folder (or among the blobs of the Hub's cache that the folder belongs to),
            cannot be read, or is implausibly large.
    """
    found: dict[Path, Carried] = {}
    for pattern in patterns:
        for match in sorted(folder.glob(pattern)):
            for file in sorted(_files_in(match)):
                if file.suffix.lower() not in _CODE:
                    check_own(file, folder)
                    if (size := file.stat().st_size) > MOST_CARRIED_BYTES:
                        raise UserError(f"{file}: {size} bytes are too many to be copied with a checkpoint: remove it")
                    name = file.relative_to(folder)
                    found[name] = Carried(name, file)
    return list(found.values())


def copy_file(carried: Carried, folder: Path) -> None:
    """Copies one file; the tokenizer's configuration without the key that names code.

    Raises:
        UserError: It is no regular file, or not JSON where that is needed.
    """
    target = folder / carried.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if carried.name == Path(_TOKENIZER_CONFIG):
        data = read_json(carried.file, "tokenizer configuration")
        if isinstance(data, dict) and _CODE_KEY in data:
            data = {key: value for key, value in data.items() if key != _CODE_KEY}
            target.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            return
    target.unlink(missing_ok=True)
    with open_regular(carried.file) as source, target.open("xb") as copy:
        shutil.copyfileobj(source, copy)


def check_own(file: Path, folder: Path) -> None:
    """Checks that a file can be copied, or published, with the folder it is in.

    Raises:
        UserError: It is no regular file inside the folder (or among the blobs of the Hub's cache that the folder belongs to), or
            cannot be read.
    """
    try:
        inside, found = _is_inside(file, folder), file.stat()
    except OSError as error:
        raise UserError(f"{file}: cannot be copied ({error.strerror}): mend or remove it") from None
    if not inside:
        raise UserError(
            f"{file}: a link out of the folder, which is not followed: put the file itself there, or remove it"
        )
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{file}: not a regular file, and cannot be copied: remove it")
    if not os.access(file, os.R_OK):
        raise UserError(f"{file}: cannot be read, and so not copied: mend or remove it")


def _is_inside(file: Path, folder: Path) -> bool:
    """Whether a file, links followed, lies in the folder, or among the blobs of the Hub's cache that the folder belongs to.

    Raises:
        OSError: It does not exist, or its links lead in a circle.
    """
    real, home = Path(os.path.realpath(file, strict=True)), Path(os.path.realpath(folder))
    # models--OWNER--NAME/snapshots/COMMIT/FILE is a link to models--OWNER--NAME/blobs/HASH.
    in_cache = home.parent.name == "snapshots" and home.parents[1].name.startswith("models--")
    return real.is_relative_to(home) or (in_cache and real.parent == home.parents[1] / "blobs")


def _files_in(match: Path) -> list[Path]:
    """The file itself, or those in a folder, at any depth; links to folders are not followed, and are refused as files."""
    if match.is_symlink() or not match.is_dir():
        return [match]
    return [Path(root) / name for root, folders, files in os.walk(match) for name in [*files, *_links(root, folders)]]


def _links(root: str, folders: Iterable[str]) -> list[str]:
    return [name for name in folders if (Path(root) / name).is_symlink()]
