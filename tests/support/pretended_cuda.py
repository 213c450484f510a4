"""What `torch.cuda` says while `pretended_devices` pretends devices."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretended_devices import PretendedDevices

GIB = 2**30


def pretended_cuda(devices: PretendedDevices) -> dict[str, Any]:
    """Functions and classes by their names in `torch.cuda`; streams and events order nothing."""
    stream = SimpleNamespace(wait_stream=nothing, wait_event=nothing, record_event=nothing, synchronize=nothing)
    event = SimpleNamespace(record=nothing, wait=nothing, synchronize=nothing)
    card = SimpleNamespace(name="pretended", total_memory=80 * GIB, major=9, minor=0, multi_processor_count=132)
    return {
        "is_available": lambda: devices.kind == "cuda",
        "is_initialized": lambda: True,
        "device_count": lambda: devices.count,
        "current_device": lambda: devices.current,
        "set_device": devices.set_current,
        "mem_get_info": lambda *_: (devices.free, 80 * GIB),
        "get_device_properties": lambda *_: card,
        "get_device_capability": lambda *_: (9, 0),
        "is_bf16_supported": lambda *_, **__: True,
        "Stream": lambda *_, **__: stream,
        "Event": lambda *_, **__: event,
        "current_stream": lambda *_: stream,
        "stream": lambda *_: nullcontext(),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *_: 0),
        **dict.fromkeys(("_lazy_init", "synchronize", "empty_cache", "reset_peak_memory_stats"), nothing),
    }


def nothing(*args: Any, **kwargs: Any) -> None:
    """What has no effect here."""


def place_of_call() -> str:
    """The innermost line of this package, or else of the libraries, that is being executed."""
    frame, found = sys._getframe(2), "elsewhere"
    while frame is not None:
        name = frame.f_code.co_filename
        if "/sglp_llm/" in name:
            return f"{name.rpartition('/sglp_llm/')[2]}:{frame.f_lineno}"
        if found == "elsewhere" and ("/transformers/" in name or "/accelerate/" in name):
            found = f"{name.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return found
