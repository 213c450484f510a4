"""Peak memory of a phase of a run, on the host and on CUDA devices."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sglp_llm.models.heap import trim

PHASE_PEAK = "peak resident memory while running, less what the process held before loading (VmHWM)"
PROCESS_PEAK = "peak resident memory of the whole process so far, loading included (ru_maxrss)"

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def devices_of(model: PreTrainedModel) -> list[torch.device]:
    """The CUDA devices that a model computes on."""
    devices = {parameter.device for parameter in model.parameters()}
    # Parameters that accelerate offloads are on "meta" between calls, and are moved to a device of its map.
    places = [place for place in getattr(model, "hf_device_map", {}).values() if place != "disk"]
    devices |= {torch.device("cuda", place) if isinstance(place, int) else torch.device(place) for place in places}
    indexed = {torch.device("cuda", device.index or 0) for device in devices if device.type == "cuda"}
    return sorted(indexed, key=lambda device: device.index)


def synchronize(devices: Iterable[torch.device]) -> None:
    """Waits until the CUDA devices have finished: kernels run asynchronously."""
    for device in devices:
        torch.cuda.synchronize(device)


def wake() -> None:
    """Makes torch initialise its libraries, whose memory would otherwise be counted as the first model's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    square = torch.ones(256, 256, device=device)
    (square @ square).sum().item()


@dataclass(frozen=True)
class Held:
    """The memory of the process at some moment.

    Attributes:
        host: Resident bytes; ``None`` where the system does not say.
        cuda: Bytes that torch had allocated, by device index.
    """

    host: int | None
    cuda: dict[int, int]


def held() -> Held:
    """The memory of the process now, after returning freed memory to the system."""
    _give_back_freed()
    cuda = {}
    if torch.cuda.is_available():
        cuda = {index: torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count())}
    return Held(_status_bytes("VmRSS"), cuda)


@dataclass
class Peak:
    """The peak memory of a phase; set when the phase ends.

    Attributes:
        host: Bytes; ``None`` where the system does not say.
        host_method: What ``host`` is: `PHASE_PEAK` or `PROCESS_PEAK`.
        device: Bytes allocated on all CUDA devices of the model, each at its own peak; ``None`` without any.
    """

    host: int | None = None
    host_method: str = PROCESS_PEAK
    device: int | None = None


@contextmanager
def watch_peak(devices: list[torch.device], before: Held) -> Iterator[Peak]:
    """Measures the peak memory inside the block.

    Args:
        devices: The CUDA devices to watch.
        before: What the process held before the model was loaded; it is subtracted, so that another model in memory does not
            count.
    """
    peak = Peak()
    _give_back_freed()
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    by_phase = _reset_host_peak() and before.host is not None
    yield peak
    synchronize(devices)
    if devices:
        peak.device = sum(torch.cuda.max_memory_allocated(device) - before.cuda[device.index] for device in devices)
    high = _status_bytes("VmHWM") if by_phase else None
    if high is not None and before.host is not None:
        peak.host, peak.host_method = max(high - before.host, 0), PHASE_PEAK
    else:
        peak.host = _process_peak()


def peak_so_far() -> Peak:
    """The peak of the whole process until now, loading and libraries included."""
    host = _status_bytes("VmHWM")  # ru_maxrss starts from the peak of the process that started this one
    device = None
    if torch.cuda.is_available():
        device = sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    return Peak(_process_peak() if host is None else host, PROCESS_PEAK, device)


def _give_back_freed() -> None:
    """Returns freed memory to the system; otherwise what loading has freed would hide what the next model allocates."""
    gc.collect()
    trim()


def _reset_host_peak() -> bool:
    """Resets the peak that the kernel counts for this process; false where that is not allowed."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int | None:
    """A line of ``/proc/self/status``, such as ``VmHWM:  12 kB``, in bytes."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _process_peak() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
