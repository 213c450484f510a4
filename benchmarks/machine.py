"""Describes the machine on which a figure was measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def describe() -> str:
    """One line: processor, cores, torch, and the GPU where there is one."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    processor = names[0] if names else platform.processor()
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    return f"{processor}, {os.cpu_count()} cores, torch {torch.__version__} ({threads}){gpu}"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []
