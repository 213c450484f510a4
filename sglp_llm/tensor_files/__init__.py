"""Returns the locations of tensors in safetensors files, and reads and writes them. Start with `reader.py`.

`reader.py` and `writer.py` need the standard library alone; `mapped.py` and `tensors.py` make torch tensors.
"""

from __future__ import annotations

# Nothing here imports torch: an export copies bytes.
from sglp_llm.tensor_files.reader import CheckpointIndex, TensorEntry, read_index

__all__ = ["CheckpointIndex", "TensorEntry", "read_index"]
