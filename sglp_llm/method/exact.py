"""Float64 where a device has it, and on the host where it has not."""

from __future__ import annotations

import torch


def exact(values: torch.Tensor) -> torch.Tensor:
    """The same numbers in float64: on their device, or on the CPU for a device without float64 (MPS)."""
    return values.to(place_of_sums(values.device)).to(torch.float64)


def place_of_sums(device: torch.device) -> torch.device:
    """Where float64 numbers of a device are kept: the device itself, or the CPU where it has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device
