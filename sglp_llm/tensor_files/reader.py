"""A folder of safetensors files -> the location of every tensor. Reads headers only, with the standard library only.

Neither torch nor safetensors is imported: an export needs names, shapes and byte ranges, and importing a tensor library
would cost it more memory than all of its own work.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sglp_llm.errors import UserError
from sglp_llm.small_files import open_regular, read_bytes

SINGLE_FILE_NAME = "model.safetensors"
INDEX_FILE_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit

DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
"""Size of one element by safetensors' name of the dtype. The packed F4 and F6 types have no whole number of bytes."""


@dataclass(frozen=True)
class TensorEntry:
    """The location of one tensor.

    Attributes:
        name: Its key in the checkpoint.
        dtype: safetensors' name of the dtype, such as ``"BF16"``; a key of `DTYPE_BYTES`.
        shape: Its shape; empty for a scalar.
        file: The file that holds it.
        offset: First byte, counted from the beginning of the file.
        nbytes: Number of bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def num_elements(self) -> int:
        """The product of the shape."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint.

    Attributes:
        folder: The checkpoint's folder.
        files: The safetensors files in order of name; one when the checkpoint is not sharded.
        tensors: Every tensor by name, in order of file, then offset.
        metadata: ``__metadata__`` of the first file.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_index(folder: Path) -> CheckpointIndex:
    """Reads the headers of a checkpoint and checks that every byte of its files is accounted for.

    Reads what transformers would load: ``model.safetensors`` rather than an index where both exist, and every tensor of
    the shards, named by the index or not, because transformers takes only the file names from the index. (A tensor that
    was dropped because the index lacks it would be initialised at random when the export is loaded.)

    Args:
        folder: A folder with ``model.safetensors``, or ``model.safetensors.index.json`` and the shards that it names.
            The files may be symbolic links, as they are in the Hub's cache.

    Raises:
        UserError: There is no safetensors checkpoint, a file of it is missing, damaged or outside the folder, the index and
            the shards contradict each other, or a tensor is in two shards.
    """
    single, index_file = folder / SINGLE_FILE_NAME, folder / INDEX_FILE_NAME
    if _is_file(single):
        weight_map: dict[str, str] = {}
        files = [single]
    elif _is_file(index_file):
        weight_map = _read_weight_map(index_file)
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        raise UserError(f"{folder}: there is neither {SINGLE_FILE_NAME} nor {INDEX_FILE_NAME} in this folder")

    tensors: dict[str, TensorEntry] = {}
    metadata: Mapping[str, str] = {}
    for file in files:
        entries, file_metadata = read_file(file)
        if file == files[0]:
            metadata = file_metadata
        for entry in entries:
            if entry.name in tensors:
                other = tensors[entry.name].file.name
                raise UserError(f"{file}: tensor {entry.name!r} stands in {other} too; it may stand in one shard only")
            tensors[entry.name] = entry

    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise UserError(f"{index_file}: tensor {name!r} is said to be in {file_name}, which does not have it")
    return CheckpointIndex(folder, tuple(files), tensors, metadata)


def _read_weight_map(index_file: Path) -> dict[str, str]:
    data = read_bytes(index_file, "index", MAX_HEADER_BYTES)
    try:
        index = _decoded(data)
    except ValueError as error:
        raise UserError(f"{index_file}: not a JSON file ({error})") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index_file}: there is no weight_map, the object that names the file of every tensor")
    for name, file_name in weight_map.items():
        # transformers joins this to the folder's path; only a plain file name is certain to be inside.
        if not isinstance(file_name, str) or file_name in ("", ".", "..") or any(c in file_name for c in "/\\\0"):
            raise UserError(f"{index_file}: the file of tensor {name!r} must be a plain file name, not {file_name!r}")
    return weight_map


def read_file(file: Path) -> tuple[list[TensorEntry], dict[str, str]]:
    """The tensors of one file in order of offset, and its metadata.

    Raises:
        UserError: There is no such file, or it is damaged.
    """
    if not _is_file(file):  # not left to open(), which would wait for ever on a pipe
        raise UserError(f"{file}: there is no such file; the checkpoint is incomplete")
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                _refuse(file, "it is a Git LFS pointer; fetch the weights with 'git lfs pull'")
            if len(prefix) < 8 or header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > size:
                _refuse(file, f"it has {size} bytes and its header is said to have {header_bytes}")
            header = _decoded(stream.read(header_bytes))
    except OSError as error:
        raise UserError(f"{file}: cannot read it ({error.strerror})") from None
    except UserError:
        raise
    except ValueError as error:
        _refuse(file, f"its header is not JSON ({error})")
    if not isinstance(header, dict):
        _refuse(file, "its header is not a JSON object")

    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or any(type(value) is not str for value in metadata.values()):
        _refuse(file, "__metadata__ must be an object of texts")
    start = 8 + header_bytes
    entries = [_entry(file, name, fields, start) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end = start
    for entry in entries:
        if entry.offset != end:
            _refuse(
                file, f"tensor {entry.name!r} {'overlaps' if entry.offset < end else 'leaves a hole after'} another"
            )
        end += entry.nbytes
    if end != size:
        _refuse(file, f"it is {'truncated' if size < end else 'too long'}: it has {size} bytes, its header means {end}")
    return entries, metadata


def _entry(file: Path, name: str, fields: object, start: int) -> TensorEntry:
    """Checks one tensor of the header; ``start`` is where the data begins."""
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= set(fields):
        _refuse(file, f"tensor {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise UserError(f"{file}: tensor {name!r} has dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}")
    if not _are_sizes(shape) or math.prod(max(size, 1) for size in shape) >= 2**63:
        _refuse(file, f"tensor {name!r} has shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(file, f"tensor {name!r} has data_offsets {offsets!r}")
    entry = TensorEntry(name, dtype, tuple(shape), file, start + offsets[0], offsets[1] - offsets[0])
    if entry.nbytes != entry.num_elements * DTYPE_BYTES[dtype]:
        _refuse(file, f"tensor {name!r} has {entry.nbytes} bytes, which do not fit {dtype} and shape {shape}")
    return entry


def _are_sizes(value: object) -> bool:
    """Whether it is a list of whole numbers, none negative (and ``True`` is no number)."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - unlike Path.is_file, does not raise where the folder cannot be searched


def _decoded(data: bytes) -> Any:
    """Decodes JSON as strictly as the safetensors library does.

    Raises:
        ValueError: It is not JSON in UTF-8, or a key occurs twice in an object (Python would silently take the last).
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        decoded = dict(pairs)
        if len(decoded) != len(pairs):
            raise ValueError(f"a key stands twice among {', '.join(repr(key) for key, _ in pairs[:3])}, ...")
        return decoded

    def refuse_constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    try:
        decoded = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if b"\\ud" in data.lower():  # half a surrogate pair is a str that cannot be encoded again
        json.dumps(decoded, ensure_ascii=False).encode()
    return decoded


def _refuse(file: Path, what: str) -> NoReturn:
    raise UserError(f"{file}: not a valid safetensors file: {what}")
