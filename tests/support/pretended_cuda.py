"""What `torch.cuda` says while `pretended_devices` pretends devices, and which functions of torch it answers."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pretended_devices import PretendedDevices

GIB = 2**30
DEVICE_OF = torch.Tensor.device.__get__
HALF = (torch.float16, torch.bfloat16)
FACTORIES = {
    getattr(torch, name)
    for names in (
        "zeros ones full empty arange tensor eye randn rand randint randperm linspace as_tensor asarray scalar_tensor",
        "empty_strided tril_indices triu_indices zeros_like ones_like empty_like full_like rand_like randn_like",
    )
    for name in names.split(" ")
}
FACTORIES |= {getattr(torch.Tensor, f"new_{name}") for name in ("zeros", "ones", "full", "empty", "tensor")}
FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")
HOOKS = (torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook)
ALONE = ("_to_copy", "set_", "detach", "resize_", "record_stream")  # the first argument alone decides


class DeviceMismatch(RuntimeError):
    """An operation got tensors on different devices."""


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


def storage_of(tensor: torch.Tensor, freed: Callable[[weakref.ref], None] | None) -> weakref.ref:
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        return weakref.ref(tensor.untyped_storage(), freed)
