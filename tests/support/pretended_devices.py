"""CPU tensors that claim to be on ``cuda:N``: real values, real autograd, and torch's rule that devices do not mix.

A storage has a place. A function mode answers ``.device`` and makes moves and factories place what they return; a dispatch mode,
which sees the backward pass too, refuses operations on different places and places their results. As with CUDA, the current
device belongs to a thread, and a new thread begins on device 0. Waits of the host for a device are counted by source line.

Not covered: kernels, what streams order, NCCL, and the numerics of a GPU.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sglp_llm

PACKAGE = f"{Path(sglp_llm.__file__).parent}/"
GIB = 2**30
DEVICE_OF = torch.Tensor.device.__get__
FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
INDICES = (torch.int64, torch.int32, torch.bool)
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")
ALONE = ("_to_copy", "set_", "detach", "resize_", "_foreach", "_fused")  # the first argument alone decides


class PretendedDevices:
    """CUDA devices that are pretended inside `pretended`.

    Args:
        count: How many.
        current: The current device of this thread.
        kind: ``cuda``, or ``mps``: a single one without float64.

    Attributes:
        waits: How often the host waited for a device, by source line and reason.
        used: The devices that tensors have been on.
        free: Bytes that are free on each.
    """

    def __init__(self, count: int = 1, current: int = 0, kind: str = "cuda") -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self.used: set[torch.device] = set()
        self.count, self.free, self.kind = count, 70 * GIB, kind
        self._thread = threading.local()
        self._thread.index = current

    @property
    def current(self) -> int:
        """Index of this thread's current device."""
        return getattr(self._thread, "index", 0)

    def set_current(self, device: Any) -> None:
        self._thread.index = self.named(device).index

    def named(self, device: Any) -> torch.device:
        """The device with its index."""
        device = torch.device(self.kind, device) if isinstance(device, int) else torch.device(device)
        is_open = device.type == self.kind and device.index is None
        return torch.device(self.kind, self.current) if is_open else device

    def of(self, tensor: torch.Tensor) -> torch.device:
        return getattr(tensor.untyped_storage(), "place", None) or DEVICE_OF(tensor)

    def put(self, tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
        tensor.untyped_storage().place = place
        if place.type == self.kind:
            self.used.add(place)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return getattr(tensor.untyped_storage(), "is_pinned_here", False)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor.untyped_storage().is_pinned_here = True
        return tensor

    def copied(self, source: torch.device, target: torch.device, behind: bool) -> None:
        """Counts the wait of a copy between a device and the host; ``behind`` says that nobody waits."""
        if source.type != target.type and not behind:
            self.wait(f"copy to {target.type}")

    def wait(self, reason: str) -> None:
        """Counts a wait, at the innermost line of this package that is being executed."""
        frames = (frame for frame, _ in traceback.walk_stack(sys._getframe()))
        mine = (frame for frame in frames if frame.f_code.co_filename.startswith(PACKAGE))
        line = next((f"{frame.f_code.co_filename[len(PACKAGE) :]}:{frame.f_lineno}" for frame in mine), "elsewhere")
        self.waits[line, reason] += 1

    @contextmanager
    def pretended(self) -> Iterator[None]:
        """Inside the block there are these devices; may be entered again."""
        thread, backward, keep = threading.Thread.run, torch.autograd._engine_run_backward, saved_tensors_hooks.__init__

        def kept(hooks: Any, pack: Any, unpack: Any) -> None:
            keep(hooks, self._modes()(pack), unpack)

        with (
            mock.patch.multiple(torch.cuda, **_cuda(self)),
            mock.patch.object(torch.accelerator, "current_stream", return_value=SimpleNamespace(is_capturing=_nothing)),
            mock.patch.object(torch.Tensor, "record_stream", _nothing),
            mock.patch.object(threading.Thread, "run", self._modes()(thread)),
            mock.patch.object(torch.autograd, "_engine_run_backward", self._modes()(backward)),
            mock.patch.object(saved_tensors_hooks, "__init__", kept),
            self._modes(),
        ):
            yield

    @contextmanager
    def _modes(self) -> Iterator[None]:
        """What is missing here: a new thread has no modes; the backward pass and hooks of an operation no function mode."""
        with ExitStack() as stack:
            if not torch._C._len_torch_function_stack():
                stack.enter_context(_Functions(self))
            if not torch._C._len_torch_dispatch_stack():
                stack.enter_context(_Operations(self))
            yield


def _cuda(devices: PretendedDevices) -> dict[str, Any]:
    """Functions and classes by their names in `torch.cuda`; streams order nothing."""
    stream = SimpleNamespace(wait_stream=_nothing, synchronize=_nothing)
    return {
        "is_available": lambda: devices.kind == "cuda",
        "device_count": lambda: devices.count,
        "current_device": lambda: devices.current,
        "set_device": devices.set_current,
        "mem_get_info": lambda *_: (devices.free, 80 * GIB),
        "is_bf16_supported": lambda *_, **__: True,
        "Stream": lambda *_: stream,
        "current_stream": lambda *_: stream,
        "stream": lambda *_: nullcontext(),
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "empty_cache": _nothing,
    }


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What has no effect here."""


def _tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for each in values:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, tuple | list):
            yield from _tensors_in(each)


class _Move(torch.autograd.Function):
    """A copy on another device; its gradient goes back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, devices: PretendedDevices, place: torch.device, dtype: torch.dtype) -> Any:
        ctx.back = devices, devices.of(x), x.dtype
        return devices.put(x.detach().to(dtype, copy=True), place)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _Move.apply(gradient, *ctx.back), None, None, None


class _Functions(TorchFunctionMode):
    """Answers what a tensor's device is, and makes moves and factories place what they return."""

    def __init__(self, devices: PretendedDevices) -> None:
        super().__init__()
        self._devices = devices
        self._answers = {
            DEVICE_OF: devices.of,
            torch.Tensor.is_cuda.__get__: lambda x: devices.of(x).type == "cuda",
            torch.Tensor.is_cpu.__get__: lambda x: devices.of(x).type == "cpu",
            torch.Tensor.get_device: lambda x: devices.of(x).index,
            torch.Tensor.is_pinned: devices.is_pinned,
            torch.Tensor.pin_memory: lambda x: devices.pin(x.clone()),
            torch.Tensor.to: self._to,
            torch.Tensor.cpu: lambda x: self._to(x, "cpu"),
            torch.Tensor.cuda: lambda x, device="cuda", **options: self._to(x, device, **options),
            torch.Tensor.tolist: self._listed,
            torch.Tensor.numpy: self._array,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._answers:
            return self._answers[func](*args, **kwargs)
        if func is torch.device and isinstance(args[0], int):
            return self._devices.named(args[0])
        if kwargs.get("device") is not None or kwargs.get("pin_memory"):
            return self._made(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _to(self, x: torch.Tensor, *given: Any, copy: bool = False, **options: Any) -> torch.Tensor:
        if given and isinstance(given[0], torch.Tensor):
            given = (self._devices.of(given[0]), given[0].dtype, *given[1:])
        elif given and isinstance(given[0], int):
            given = (self._devices.named(given[0]), *given[1:])
        device, dtype, behind, _ = torch._C._nn._parse_to(*given, **options)
        source, dtype = self._devices.of(x), dtype or x.dtype
        place = source if device is None else self._devices.named(device)
        if source == place or "meta" in (source.type, place.type):
            return x.to(DEVICE_OF(x) if source == place else place, dtype, copy=copy)
        self._devices.copied(source, place, behind and place.type != "cpu")
        return _Move.apply(x, self._devices, place, dtype)

    def _made(
        self, func: Any, *args: Any, device: Any = "cpu", pin_memory: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        devices, place = self._devices, self._devices.named(device or "cpu")
        if place.type == "meta":
            return func(*args, device=place, **kwargs)
        if func in (torch.as_tensor, torch.asarray) and isinstance(args[0], torch.Tensor):
            return self._to(args[0], place, dtype=kwargs.get("dtype"))
        if func in FROM_PYTHON and place.type == devices.kind:
            devices.wait("numbers from Python")
        made = devices.put(func(*args, **kwargs, device="cpu"), place)
        return devices.pin(made) if pin_memory else made

    def _listed(self, x: torch.Tensor) -> Any:
        if (
            x.ndim and self._devices.of(x).type == self._devices.kind
        ):  # what has no dimension is counted as an operation
            self._devices.wait("tolist")
        return x.tolist()

    def _array(self, x: torch.Tensor) -> Any:
        if self._devices.of(x).type == self._devices.kind:
            raise TypeError(f"can't convert {self._devices.of(x)} device type tensor to numpy")
        return x.numpy()


class _Operations(TorchDispatchMode):
    """Refuses operations on different places, and places results."""

    def __init__(self, devices: PretendedDevices) -> None:
        super().__init__()
        self._devices = devices

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiles here, and the import of the compiler takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        devices = self._devices
        with torch._C.DisableTorchFunction():
            tensors = list(_tensors_in((*args, *(kwargs or {}).values())))
            given = [(each, devices.of(each)) for each in tensors if not each.is_meta]
            if not any(place.type == devices.kind for _, place in given):
                return func(*args, **(kwargs or {}))
            behind = len(args) > 2 and args[2] is True  # copy_(target, source, non_blocking)
            place = self._common(func.__name__.partition(".")[0], given, behind)
            result = func(*args, **(kwargs or {}))
            for made in _tensors_in((result,)):
                # A view of what has a place has it too.
                if devices.of(made).type == "cpu" and all(made is not each for each in tensors):
                    devices.put(made, place)
            return result

    def _common(self, name: str, given: list[tuple[torch.Tensor, torch.device]], behind: bool) -> torch.device:
        """The place of the result."""
        devices, (target, first) = self._devices, given[0]
        if devices.kind == "mps" and any(each.dtype == torch.float64 for each, _ in given):
            raise TypeError(f"{name}: MPS has no float64")
        if name == "copy_":
            devices.copied(given[-1][1], first, behind and (first.type != "cpu" or devices.is_pinned(target)))
        if name == "copy_" or name.startswith(ALONE):
            return first
        if name in WAITING:
            devices.wait(name)
        mixing = set()
        for number, (each, place) in enumerate(given):
            is_index = number > 0 and name in INDEXING and each.dtype in INDICES
            if is_index and each.ndim and (place.type == "cpu" or each.dtype == torch.bool):
                devices.wait("index on the host, or of truth values")
            if place.type != "cpu" or (each.ndim and not is_index):
                mixing.add(place)
        if len(mixing) > 1:
            found = " and ".join(sorted(map(str, mixing)))
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {found}")
        return mixing.pop()
