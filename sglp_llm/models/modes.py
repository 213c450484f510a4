"""The mode that a live model computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


def has_fast_bfloat16() -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capability = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(capability and capability())


def products_in_bfloat16(device: torch.device, enabled: bool) -> AbstractContextManager[object]:
    """Inside the block matrices are multiplied in bfloat16; where it is not enabled, as outside.

    No weight is kept in both dtypes: the memory is that of the model as it is.
    """
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if enabled else nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block (OPT has LayerDrop); every module's mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
