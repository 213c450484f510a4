"""One safetensors file <-> a few tensors by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from sglp_llm.errors import UserError
from sglp_llm.tensor_files.mapped import DTYPES, mapped_tensor
from sglp_llm.tensor_files.reader import read_file
from sglp_llm.tensor_files.writer import NewTensor, write_safetensors

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the file, on the CPU; views of the mapped file.

    Raises:
        UserError: There is no such file, it is damaged, or holds an unsupported dtype.
    """
    entries, _ = read_file(file)
    for entry in entries:
        if entry.dtype not in DTYPES:
            raise UserError(f"{file}: tensor {entry.name!r} has dtype {entry.dtype}; known: {', '.join(DTYPES)}")
    return {entry.name: mapped_tensor(entry) for entry in entries}


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes the tensors to a new file of this name; views of an old file stay valid."""
    file.unlink(missing_ok=True)
    entries = [(name, new_tensor(tensor)) for name, tensor in tensors.items()]
    write_safetensors(file, entries, {"format": "pt"}, lambda _: None)


def sha256_of(*files: Path) -> str:
    """The sha256, in hex, of the files' bytes one after another, read a piece at a time."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def new_tensor(tensor: torch.Tensor) -> NewTensor:
    """The tensor's bytes, without a copy where it is contiguous and on the CPU."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return NewTensor(_NAMES[tensor.dtype], tuple(tensor.shape), data)
