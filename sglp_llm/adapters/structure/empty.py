"""Models without weights: every parameter on the meta device, real buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_LARGE = 2**20
"""Numbers of a tensor from which on it is not made on the CPU first; buffers that are filled afterwards have fewer."""


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside the block models are built without weights, in no time and no memory.

    Buffers are real, because rotary frequencies and embedding scales are in no file. accelerate makes each parameter on the CPU
    and moves it: the stacked experts of a large model would not fit there.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), _LargeOnMeta():
        yield


class _LargeOnMeta(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None and "out" not in kwargs:
            tensor = torch.empty(*args, **{**kwargs, "device": "meta"})
            if tensor.numel() >= _LARGE:
                return tensor
        return func(*args, **kwargs)
