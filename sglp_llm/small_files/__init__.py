"""Returns what small files hold that others may have written, copies what a checkpoint carries, and writes our own small files.

Start with `reading.py`.

Nothing else in the program opens such a file. Only the standard library is used.
"""

from __future__ import annotations

from sglp_llm.small_files.carrying import Carried, carried_files, check_own, copy_file
from sglp_llm.small_files.plain_data import checked_data, decoded_json
from sglp_llm.small_files.reading import (
    check_regular_files,
    open_regular,
    read_bytes,
    read_json,
    read_json_lines,
    read_text,
)
from sglp_llm.small_files.writing import replace_text

__all__ = [
    "Carried",
    "carried_files",
    "check_own",
    "check_regular_files",
    "checked_data",
    "copy_file",
    "decoded_json",
    "open_regular",
    "read_bytes",
    "read_json",
    "read_json_lines",
    "read_text",
    "replace_text",
]
