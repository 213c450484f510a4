"""Tensors as views of a memory-mapped safetensors file: nothing is read before it is used, nothing is copied."""

from __future__ import annotations

import mmap

import torch

from sglp_llm.tensor_files.reader import TensorEntry

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Torch's dtype by safetensors' name."""


def mapped_tensor(entry: TensorEntry, mappings: list[mmap.mmap] | None = None) -> torch.Tensor:
    """The tensor on the CPU, in the file's dtype. Its memory is released with the last view of it.

    Each tensor has a mapping of its own: pages that were read count as resident memory as long as their mapping exists, so one
    mapping per file would grow to the file's size. The kernel is advised to read ahead. Writes do not change the file.

    Args:
        entry: Location of the tensor.
        mappings: Its mapping is appended here; see `forget_pages`.
    """
    dtype = DTYPES[entry.dtype]
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=dtype)
    start = entry.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with entry.file.open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), entry.offset + entry.nbytes - start, access=mmap.ACCESS_COPY, offset=start)
    if hasattr(mmap, "MADV_WILLNEED"):
        mapping.madvise(mmap.MADV_WILLNEED)
    if mappings is not None:
        mappings.append(mapping)
    offset = entry.offset - start
    if offset % dtype.itemsize:  # a header of odd length: no kernel computes on such addresses
        return torch.frombuffer(bytearray(mapping[offset:]), dtype=dtype).view(entry.shape)
    return torch.frombuffer(mapping, dtype=dtype, count=entry.num_elements, offset=offset).view(entry.shape)


def forget_pages(mappings: list[mmap.mmap]) -> None:
    """Releases the resident pages of tensors that were not written to; they are read again on the next use."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for mapping in mappings:
            mapping.madvise(mmap.MADV_DONTNEED)
