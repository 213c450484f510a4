"""Free memory: on the host within the limits of this process, on the devices, and on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from sglp_llm.memory.records import FreeMemory
from sglp_llm.models.devices import free_on

ROOT = Path("/")


def free_memory(all_devices: bool = False, scratch: str | None = None) -> FreeMemory:
    """The memory that a run could use.

    Args:
        all_devices: Count every CUDA device, not only the one on which a model is placed by default.
        scratch: A folder, which need not exist yet, on the disk in question.
    """
    device = None
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count()) if all_devices else [torch.cuda.current_device()]
        device = sum(free_on(torch.device("cuda", index)) or 0 for index in devices)
    return FreeMemory(host_free(), device, None if scratch is None else _disk_free(Path(scratch)))


def host_free(root: Path = ROOT) -> int | None:
    """Bytes that this process could still allocate without swapping; ``None`` where the system does not say.

    The minimum of what the kernel calls available and what each control group (versions 1 and 2) of the process has left,
    its file cache not counted as used. Where there is no ``/proc``: the free pages, or else all pages, of ``sysconf``.

    Args:
        root: Where ``proc`` and ``sys`` are mounted.
    """
    available = _fields(root / "proc/meminfo").get("MemAvailable")
    left = [*([] if available is None else [available * 1024]), *_left_in_groups(root)]
    return min(left) if left else _pages()


def _left_in_groups(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, usage, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):  # a container may see its own group as the mount's root
            folder = root / mount / group
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None:
                yield max(most - used + _fields(folder / "memory.stat").get(cache, 0), 0)


def _number(file: Path) -> int | None:
    """The number in a file; ``None`` without the file, or where it says ``max``."""
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdecimal() else None


def _fields(file: Path) -> dict[str, int]:
    """Lines such as ``MemAvailable:  12 kB`` or ``inactive_file 12``."""
    words = (line.replace(":", " ").split() for line in _lines(file))
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _pages() -> int | None:
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if name in getattr(os, "sysconf_names", {}):
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    return None


def _disk_free(folder: Path) -> int | None:
    folder = folder.expanduser().absolute()
    there = next((place for place in (folder, *folder.parents) if place.exists()), None)
    return None if there is None else shutil.disk_usage(there).free
