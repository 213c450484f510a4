"""Real processes that connect as those of a launcher do, forked from one server process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# A server imports what is slow once, and every process is a fork of it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed", "transformers.models.llama.modeling_llama", "pytest"])

PATIENCE = 120
"""Seconds after which processes that still run are killed."""


def in_processes(count: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns in each process, or the error that it raises; ``None`` from a killed one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    files = [folder / f"result-{rank}" for rank in range(count)]
    processes = [
        _CONTEXT.Process(target=_run, args=(rank, count, port, file, function, arguments))
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    waiting = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not waiting, f"processes {waiting} did not end"
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def _run(
    rank: int, count: int, port: int, file: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        result = function(*arguments)
    except Exception as error:
        result = error
    file.write_bytes(pickle.dumps(result))
