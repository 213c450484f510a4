"""The device that a process computes on, and what is free there."""

from __future__ import annotations

import torch


def own_device() -> torch.device:
    """This process's GPU, by its index, where there is one; else the CPU.

    A thread that loads weights begins on device 0, whatever the current device of the main thread is: the index must be named.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def free_on(device: torch.device) -> int | None:
    """Bytes that tensors could still take on a CUDA device, what the allocator keeps for them included; else ``None``."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)
