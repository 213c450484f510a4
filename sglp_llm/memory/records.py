"""Records of a memory prediction, in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineMemory:
    """Predicted memory of a run with one engine: named parts in bytes, whose sum is the peak.

    Attributes:
        engine: ``resident`` or ``streamed``.
        host: Parts on the host.
        device: Parts on the device; ``None`` when everything is computed on the host.
        disk: Bytes in the scratch folder.
        step: Sequences per step of a pass with gradients.
        state_bytes: Most bytes of stored hidden states that may stay on the device; they are among its parts.
    """

    engine: str
    host: Mapping[str, int]
    device: Mapping[str, int] | None
    disk: int
    step: int = 1
    state_bytes: int = 0

    @property
    def host_peak(self) -> int:
        """Bytes on the host."""
        return sum(self.host.values())

    @property
    def device_peak(self) -> int | None:
        """Bytes on the device; ``None`` without one."""
        return None if self.device is None else sum(self.device.values())


@dataclass(frozen=True)
class MemoryPlan:
    """The prediction for both engines."""

    resident: EngineMemory
    streamed: EngineMemory


@dataclass(frozen=True)
class FreeMemory:
    """Free memory, in bytes.

    Attributes:
        host: ``None`` where the system does not say.
        device: ``None`` without a CUDA device.
        disk: On the disk of the scratch folder; ``None`` without one.
    """

    host: int | None
    device: int | None = None
    disk: int | None = None
