"""A folder's checkpoint -> a GGUF file, by llama.cpp's own converter, and compared with the checkpoint."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from sglp_llm.adapters.structure.config_keys import LAYER_KINDS, PER_LAYER
from sglp_llm.adapters.structure.gguf_keys import OTHER_MODEL_AT
from sglp_llm.checkpoint.gguf_file import copy_gguf, derived_wrongly
from sglp_llm.checkpoint.publish_file import atomic_file, check_file
from sglp_llm.errors import UserError
from sglp_llm.models import Source, find_source
from sglp_llm.models.loading import checkpoint_dtype, load_model
from sglp_llm.onwards.exported import Exported
from sglp_llm.plan import PLAN_FILE_NAME, load_plan, plan_to_dict
from sglp_llm.plan.published import without_local_paths

GGUF_FILE_NAME = "model.gguf"
CONVERTER = "convert_hf_to_gguf.py"
CLONE_VARIABLE = "LLAMA_CPP"
"""Environment variable with the path of a clone of llama.cpp."""

_OUTTYPES: Mapping[torch.dtype, str] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_COMPARED = (2, 64)
_TOLERANCE = 0.02
"""Largest difference of logits, relative to the largest: the converter may round what it computes, such as Gemma's norms."""


def export_gguf(folder: Path, output: Path | None = None, overwrite: bool = False) -> Exported:
    """Converts a folder's checkpoint, in the dtype that it is stored in.

    Where transformers reads the result, its logits are compared with the checkpoint's.

    Args:
        folder: A folder that prune or heal has written.
        output: The file; by default ``model.gguf`` in the folder.
        overwrite: Replace the file if it exists.

    Raises:
        UserError: The converter is not there, or refuses the checkpoint; or llama.cpp would compute something else with the
            result; or the output exists.
    """
    path = output or folder / GGUF_FILE_NAME
    check_file(path, overwrite)
    converter = find_converter()
    source = find_source(folder)
    if source.index is None:
        raise UserError(
            f"{folder}: llama.cpp's converter reads safetensors here, and this is a {source.format} checkpoint"
        )
    _check_depth(folder, source)
    converted = path.with_name(f".{path.stem}.converted.gguf")
    with atomic_file(path, overwrite) as partial:
        try:
            _convert(converter, source, converted)
            notes = _finish(source, converted, partial, folder)
        finally:
            converted.unlink(missing_ok=True)
    return Exported((path,), tuple(notes), f"llama-cli -m {shlex.quote(str(path))}")


def find_converter() -> Path:
    """llama.cpp's ``convert_hf_to_gguf.py``: in the clone that `CLONE_VARIABLE` names, or on the search path.

    Raises:
        UserError: It is in neither.
    """
    if clone := os.environ.get(CLONE_VARIABLE):
        script = Path(clone).expanduser() / CONVERTER
        if not script.is_file():
            raise UserError(f"{CLONE_VARIABLE}={clone}: there is no {CONVERTER} in it; name a clone of llama.cpp")
        return script
    if found := shutil.which(CONVERTER):
        return Path(found)
    raise UserError(
        f"{CONVERTER} is not found, which makes GGUF files: `git clone https://github.com/ggml-org/llama.cpp`, and name the "
        f"clone in {CLONE_VARIABLE}"
    )


def _check_depth(folder: Path, source: Source) -> None:
    """Refuses a model that llama.cpp tells from smaller ones by its depth alone."""
    if not (folder / PLAN_FILE_NAME).is_file():
        return
    depth = load_plan(folder).num_layers
    arch = source.identity.model_type.removesuffix("_text")
    if OTHER_MODEL_AT.get(arch) == depth != source.num_layers:
        raise UserError(
            f"{folder}: llama.cpp knows the original's scale of attention by its {depth} layers, and would take another for "
            f"{source.num_layers}: there is no GGUF file for it"
        )


def _convert(converter: Path, source: Source, output: Path) -> None:
    outtype = _OUTTYPES.get(checkpoint_dtype(source), "auto")
    command = [sys.executable, str(converter), str(source.path), "--outfile", str(output), "--outtype", outtype]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != 0 or not output.is_file():
        last = (ended.stderr.strip() or "no message").splitlines()[-1]
        missing = "; pip install what its requirements/ name" if last.startswith("ModuleNotFoundError") else ""
        raise UserError(f"{source.path}: {CONVERTER} failed ({last[:300]}){missing}")


def _finish(source: Source, converted: Path, partial: Path, folder: Path) -> list[str]:
    """Moves or copies the converter's file to where it is published from, with what it lacks; returns the notes."""
    notes = []
    try:
        theirs = find_source(converted)
    except UserError:  # a family whose GGUF files transformers does not read
        converted.replace(partial)
        notes.append("not compared with the checkpoint: transformers does not read GGUF files of this family")
        if (key := _several_kinds(source)) is not None:
            notes.append(
                f"{key} has several kinds of layers, which llama.cpp may derive from a layer's index, wrongly after removal: "
                "compare its answers with the checkpoint's before you use the file"
            )
        return notes
    if derived_wrongly(source.text_config, converted):
        theirs = replace(theirs, config=source.text_config)
        about = plan_to_dict(load_plan(folder)) if (folder / PLAN_FILE_NAME).is_file() else {}
        notes += copy_gguf(theirs, range(source.num_layers), partial, json.dumps(without_local_paths(about)))
    notes.append(_compared(source, theirs))
    if converted.is_file() and not partial.is_file():
        converted.replace(partial)
    return notes


def _several_kinds(source: Source) -> str | None:
    """A configuration key that says of some layers something else than of others."""
    values = {key: getattr(source.text_config, key, None) for key in sorted({*PER_LAYER, *LAYER_KINDS})}
    return next(
        (key for key, value in values.items() if isinstance(value, list) and len(set(map(str, value))) > 1), None
    )


def _compared(ours: Source, theirs: Source) -> str:
    """Compares the logits on random tokens, with one model in memory after the other."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(ours.text_config.vocab_size), _COMPARED, generator=generator)
    expected, found = _logits(ours, ids), _logits(theirs, ids)
    difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
    if not difference <= _TOLERANCE * largest:  # written so that NaN fails
        raise UserError(
            f"{ours.path}: {CONVERTER} wrote a file that computes something else: logits differ by {difference:.3g}, and the "
            f"largest is {largest:.3g}"
        )
    same = int((expected.argmax(-1) == found.argmax(-1)).sum())
    return (
        f"read by transformers, the file gives the same next token as the checkpoint at {same} of {ids.numel()} positions; "
        f"largest difference of logits {difference:.3g} of {largest:.3g}"
    )


def _logits(source: Source, ids: torch.Tensor) -> torch.Tensor:
    decoder = load_model(source, "float32")
    with torch.inference_mode():
        logits: torch.Tensor = decoder.model(ids.to(decoder.input_device), use_cache=False).logits
    return logits.float().cpu()
