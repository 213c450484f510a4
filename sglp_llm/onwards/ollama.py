"""A folder's GGUF file, which is made where it is missing -> ollama's Modelfile beside it."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from sglp_llm.checkpoint.publish_file import atomic_file, check_file
from sglp_llm.errors import UserError
from sglp_llm.onwards.exported import Exported
from sglp_llm.onwards.gguf import GGUF_FILE_NAME, export_gguf

MODELFILE_NAME = "Modelfile"


def export_ollama(folder: Path, output: Path | None = None, overwrite: bool = False) -> Exported:
    """Writes a Modelfile. ollama takes the chat template from the GGUF file.

    Args:
        folder: A folder that prune or heal has written, or a GGUF file.
        output: The file; by default ``Modelfile`` beside the GGUF file.
        overwrite: Replace the file if it exists. A GGUF file that is there is used as it is.

    Raises:
        UserError: There is no GGUF file and none can be made, see `export_gguf`; or the output exists.
    """
    gguf = folder if folder.suffix == ".gguf" else folder / GGUF_FILE_NAME
    path = output or gguf.parent / MODELFILE_NAME
    check_file(path, overwrite)
    files, notes = [path], []
    if not gguf.is_file():
        if gguf == folder:
            raise UserError(f"{folder}: there is no such file")
        made = export_gguf(folder)
        files, notes = [*made.files, path], [*made.notes]
    beside = gguf.resolve().parent == path.resolve().parent
    name = f"./{gguf.name}" if beside else str(gguf.resolve())
    with atomic_file(path, overwrite) as partial:
        partial.write_text(f"FROM {name}\n", encoding="utf-8")
    if shutil.which("ollama") is None:
        notes.append("ollama is not installed here, and the file was not tried: see https://ollama.com/download")
    return Exported(tuple(files), tuple(notes), f"ollama create NAME -f {shlex.quote(str(path))}")
