"""The names of the other programs' forms, each with what writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from sglp_llm.errors import unknown
from sglp_llm.onwards.exported import Exported
from sglp_llm.onwards.gguf import export_gguf
from sglp_llm.onwards.mergekit import export_mergekit
from sglp_llm.onwards.ollama import export_ollama
from sglp_llm.onwards.vllm_draft import export_vllm_draft

Export = Callable[[Path, Path | None, bool], Exported]
"""Writes a folder's checkpoint or plan; arguments: the folder, the output (``None``: in the folder), whether to replace it."""

TARGETS: Mapping[str, Export] = {
    "gguf": export_gguf,
    "mergekit": export_mergekit,
    "ollama": export_ollama,
    "vllm-draft": export_vllm_draft,
}


def export(folder: Path, target: str, output: Path | None = None, overwrite: bool = False) -> Exported:
    """Writes a folder that prune or heal has written in the form of another program.

    Args:
        folder: The folder.
        target: A key of `TARGETS`.
        output: Where to; by default a file in the folder.
        overwrite: Replace what is there.

    Raises:
        UserError: The target is unknown, or the folder does not hold what it needs; or the output exists.
    """
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)
    return TARGETS[target](folder, output, overwrite)
