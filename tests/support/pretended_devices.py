"""CPU tensors that claim to be on ``cuda:N``: real values, real autograd, and torch's rule that devices do not mix.

A storage carries a tag. A function mode answers ``.device`` and makes moves and factories tag what they return; a dispatch mode,
which the backward pass enters too, refuses operations on different tags and tags their results. As with CUDA, the current device
belongs to a thread, and a new thread begins on device 0. Waits of the host for a device are counted by source line.

Not covered: kernels, what streams order, NCCL, and the numerics of a GPU.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from pretended_cuda import (
    ALONE,
    DEVICE_OF,
    FACTORIES,
    FROM_PYTHON,
    GIB,
    HALF,
    HOOKS,
    INDEXING,
    WAITING,
    DeviceMismatch,
    nothing,
    place_of_call,
    pretended_cuda,
    storage_of,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
        self._tags: dict[weakref.ref, torch.device] = {}
        self._pinned: set[weakref.ref] = set()
        self._thread = threading.local()
        self._thread.index = current

    @property
    def current(self) -> int:
        """Index of this thread's current device."""
        return getattr(self._thread, "index", 0)

    def named(self, device: Any) -> torch.device:
        """The device with its index."""
        device = torch.device(self.kind, device) if isinstance(device, int) else torch.device(device)
        is_open = device.type == self.kind and device.index is None
        return torch.device(self.kind, self.current) if is_open else device

    def of(self, tensor: torch.Tensor) -> torch.device | None:
        """The pretended device; ``None`` for a tensor that is really on the CPU."""
        return self._tags.get(storage_of(tensor, None))

    def put(self, tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
        key = storage_of(tensor, self._forget)
        if device is None or device.type != self.kind:
            self._forget(key)
        else:
            self._tags[key] = device
            self.used.add(device)
        return tensor

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned.add(storage_of(tensor, self._forget))
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return storage_of(tensor, None) in self._pinned

    def wait(self, reason: str) -> None:
        self.waits[place_of_call(), reason] += 1

    def across(self, source: torch.Tensor, target: torch.Tensor | None, to: torch.device | None, behind: bool) -> None:
        """Counts the wait of a copy between a device and the host; ``behind`` is torch's ``non_blocking``."""
        if to is None and not (behind and target is not None and self.is_pinned(target)):
            self.wait("copy to the host")
        elif to is not None and self.of(source) is None and not behind:
            self.wait("copy from the host")

    @contextmanager
    def pretended(self) -> Iterator[None]:
        """Inside the block there are these CUDA devices; may be entered again."""
        submit, keep = ThreadPoolExecutor.submit, torch.autograd.graph.saved_tensors_hooks.__init__

        def submitted(pool: ThreadPoolExecutor, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            return submit(pool, self.hooked(function), *args, **kwargs)

        def kept(hooks: Any, pack: Any, unpack: Any) -> None:  # activation checkpointing
            keep(hooks, self.hooked(pack), self.hooked(unpack))

        with ExitStack() as stack:
            for name, fake in pretended_cuda(self).items():
                stack.enter_context(mock.patch.object(torch.cuda, name, fake))
            stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", nothing))
            stack.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", submitted))
            stack.enter_context(mock.patch.object(torch.autograd.graph.saved_tensors_hooks, "__init__", kept))
            stack.enter_context(self._modes())
            yield

    def hooked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with the modes, for another thread or the backward pass: neither inherits function modes."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            functions = nullcontext() if torch._C._len_torch_function_stack() else _Functions(self)
            with functions, nullcontext() if torch._C._len_torch_dispatch_stack() else _Operations(self):
                return function(*args, **kwargs)

        return inside

    @contextmanager
    def _modes(self) -> Iterator[None]:
        with _Functions(self), _Operations(self):
            yield

    def set_current(self, device: Any) -> None:
        self._thread.index = self.named(device).index

    def _forget(self, key: weakref.ref) -> None:
        self._tags.pop(key, None)
        self._pinned.discard(key)


class _Move(torch.autograd.Function):
    """A copy to another device; its gradient goes back."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, devices: PretendedDevices, to: torch.device | None, dtype: torch.dtype
    ) -> Any:
        ctx.devices, ctx.source, ctx.dtype = devices, devices.of(x), x.dtype
        return _copied(devices, x, to, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _copied(ctx.devices, gradient, ctx.source, ctx.dtype), None, None, None


def _copied(devices: PretendedDevices, x: torch.Tensor, to: torch.device | None, dtype: torch.dtype) -> torch.Tensor:
    with torch._C._DisableTorchDispatch():
        return devices.put(x.detach().to(dtype, copy=True), to)


class _Functions(TorchFunctionMode):
    """Answers what a tensor's device is, and makes moves and factories tag what they return."""

    def __init__(self, devices: PretendedDevices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, devices = dict(kwargs or {}), self._devices
        if func in HOOKS:
            return func(args[0], devices.hooked(args[1]), *args[2:], **kwargs)
        if func is torch.device and isinstance(args[0], int):
            return devices.named(args[0])
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            where = "cpu" if func is torch.Tensor.cpu else (args[1:] or (kwargs.pop("device", None) or "cuda",))[0]
            return self._to(args[0], where, **kwargs)
        if func in (torch.mm, torch.bmm) and "out_dtype" in kwargs:  # CUDA only
            a, b = args
            assert a.dtype in HALF
            assert devices.of(a) is not None
            assert kwargs["out_dtype"] == torch.float32
            return func(a.float(), b.float())
        if func is torch.Tensor.pin_memory or kwargs.pop("pin_memory", False):
            tensor = args[0].clone() if func is torch.Tensor.pin_memory else func(*args, **kwargs)
            return devices.pin(tensor)
        if func in FACTORIES and kwargs.get("device") is not None:
            return self._made(func, args, kwargs)
        tag = devices.of(args[0]) if args and isinstance(args[0], torch.Tensor) else None
        if func is torch.Tensor.is_pinned:
            return devices.is_pinned(args[0])
        if tag is not None:
            answers: dict[Any, Any] = {
                DEVICE_OF: tag,
                torch.Tensor.is_cuda.__get__: devices.kind == "cuda",
                torch.Tensor.is_cpu.__get__: False,
                torch.Tensor.get_device: tag.index,
            }
            if func in answers:
                return answers[func]
            if func is torch.Tensor.tolist and args[0].ndim:  # what has no dimension goes on to `item`
                devices.wait("tolist")
            if func is torch.Tensor.numpy:
                raise TypeError("can't convert a cuda tensor to numpy")
        return func(*args, **kwargs)

    def _to(self, x: torch.Tensor, *given: Any, **kwargs: Any) -> torch.Tensor:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        behind, copy = kwargs.get("non_blocking", False), kwargs.get("copy", False)
        for each in given:
            if isinstance(each, torch.Tensor):
                device, dtype = self._devices.of(each) or DEVICE_OF(each), each.dtype
            elif isinstance(each, torch.dtype):
                dtype = each
            elif isinstance(each, bool):
                behind = each
            elif each is not None:
                device = each
        source = self._devices.of(x)
        where = source if device is None else self._devices.named(device)
        dtype = dtype or x.dtype
        if x.is_meta or (where is not None and where.type == "meta"):
            return x.to(device=device, dtype=dtype)
        to = where if where is not None and where.type == self._devices.kind else None
        if source == to:
            return x.to(dtype, copy=copy)
        self._devices.across(x, None, to, behind)
        if x.requires_grad and torch.is_grad_enabled():
            return _Move.apply(x, self._devices, to, dtype)
        return _copied(self._devices, x, to, dtype)

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        where = self._devices.named(kwargs.pop("device"))
        if where.type == "meta":
            return func(*args, device=where, **kwargs)
        if func in (torch.as_tensor, torch.asarray) and isinstance(args[0], torch.Tensor):
            return self._to(args[0], where, dtype=kwargs.get("dtype"))
        if func in FROM_PYTHON and where.type == self._devices.kind:
            self._devices.wait("numbers from Python")
        with torch._C._DisableTorchDispatch():
            return self._devices.put(func(*args, **kwargs, device="cpu"), where)


class _Operations(TorchDispatchMode):
    """Refuses operations on different devices, and tags results."""

    def __init__(self, devices: PretendedDevices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor) and not each.is_meta]
        tags = [self._devices.of(each) for each in given]
        behind = len(args) > 2 and args[2] is True  # copy_(target, source, non_blocking)
        common = self._common(name, given, tags, behind) if any(tags) else None
        if self._devices.kind == "mps" and common is not None and any(each.dtype == torch.float64 for each in given):
            raise TypeError(f"{name}: MPS has no float64")
        result = func(*args, **(kwargs or {}))
        if common is not None:
            for made in tree_leaves(result):
                if isinstance(made, torch.Tensor) and not made.is_meta and all(made is not each for each in given):
                    self._devices.put(made, self._devices.of(made) or common)
        return result

    def _common(
        self, name: str, given: list[torch.Tensor], tags: list[torch.device | None], behind: bool
    ) -> torch.device | None:
        """The device of the result."""
        first = tags[0]
        if name.startswith(("_foreach", "_fused")) or name in ALONE:
            return first
        if name == "copy_":
            if len(tags) > 1 and first != tags[1]:
                self._devices.across(given[1], given[0], first, behind)
            return first
        if name in INDEXING:
            for each, tag in zip(given[1:], tags[1:], strict=True):
                is_index = each.dtype in (torch.int64, torch.int32, torch.bool)
                if tag is None and is_index and each.ndim and first is not None:
                    self._devices.wait("index on the host")
                elif tag != first and not (tag is None and (is_index or each.ndim == 0)):
                    raise DeviceMismatch(f"{name}: {first or 'cpu'} and {tag or 'cpu'}")
                if each.dtype == torch.bool and first is not None:
                    self._devices.wait("boolean index")
            return first
        if name in WAITING:
            self._devices.wait(name)
        mixing = {str(tag or "cpu") for each, tag in zip(given, tags, strict=True) if tag is not None or each.ndim > 0}
        if len(mixing) > 1:
            raise DeviceMismatch(f"{name}: expected all tensors to be on the same device, but found {sorted(mixing)}")
        return next(tag for tag in tags if tag is not None)
