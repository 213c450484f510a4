"""Runs a model's own code on fake tensors and counts the bytes that are alive.

What a decoder layer keeps for its backward pass depends on the family, the attention kernel and the dtype; no formula over a
configuration predicts it. torch's fake tensors track shape, dtype and aliasing, and take no memory.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import wraps
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel, masking_utils

from sglp_llm.adapters import adapter_of, auto_class
from sglp_llm.engine.loss import sequence_loss

_Measure = TypeVar("_Measure", bound=Callable[..., int])

_KEPT = 4
"""How many models `dry_run` keeps."""


def _once(measure: _Measure) -> _Measure:
    """A method that runs the model the first time that it is asked for these sizes."""

    @wraps(measure)
    def number(dry: DryRun, *sizes: int) -> int:
        key: tuple[str | int, ...] = (measure.__name__, *sizes)
        if key not in dry.numbers:
            dry.numbers[key] = measure(dry, *sizes)
        return dry.numbers[key]

    return number  # type: ignore[return-value]


class DryRun:
    """A full-size model of fake tensors.

    Args:
        config: The resolved configuration of a family with an adapter.
        dtype: The dtype it computes in.

    Attributes:
        model: The whole model: count its parameters, do not run it.
        layers: Its decoder layers.
        numbers: What was measured, by measure and sizes.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype) -> None:
        adapter = adapter_of(config)
        # On fake tensors torch multiplies stacked expert matrices in bfloat16 only; other dtypes are scaled from it.
        computed = torch.bfloat16 if adapter.stacks_experts else dtype
        self._scale = max(1.0, dtype.itemsize / computed.itemsize)
        self._mode = FakeTensorMode()
        with self._mode:
            self.model: PreTrainedModel = auto_class(config).from_config(deepcopy(config), dtype=computed).eval()
        parent, _, self._name = adapter.layers.rpartition(".")
        self._parent = self.model.get_submodule(parent)
        self.layers: torch.nn.ModuleList = getattr(self._parent, self._name)
        self.model.requires_grad_(False)
        for parameter in self.layers.parameters():
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
        self.numbers: dict[tuple[str | int, ...], int] = {}

    @_once
    def kept_for_backward(self, num_layers: int, tokens: int) -> int:
        """Bytes alive after the forward pass of one sequence through that many layers, without the head."""
        with self._running(num_layers) as live:
            states = self.model.base_model(input_ids=self._ids(1, tokens), use_cache=False)
            kept = live.now
            del states
        return round(self._scale * kept)

    @_once
    def training_peak(self, num_layers: int, tokens: int) -> int:
        """Peak bytes alive in a forward and backward pass of one sequence, each gradient freed once it is accumulated."""
        with self._running(num_layers) as live:
            ids = self._ids(1, tokens)
            sequence_loss(self.model(input_ids=ids, use_cache=False).logits, ids).sum().backward()
        return round(self._scale * live.peak)

    @_once
    def forward_peak(self, num_layers: int, batch: int, tokens: int) -> int:
        """Peak bytes alive in a forward pass without gradients, without the head."""
        with torch.no_grad(), self._running(num_layers) as live:
            self.model.base_model(input_ids=self._ids(batch, tokens), use_cache=False)
        return round(self._scale * live.peak)

    @contextmanager
    def _running(self, num_layers: int) -> Iterator[_Live]:
        """Inside the block the model has its first ``num_layers`` layers only, and new tensors are counted."""
        setattr(self._parent, self._name, torch.nn.ModuleList(list(self.layers)[:num_layers]))
        try:
            with self._mode, _without_torchs_log(), _one_sequence_a_row(), _Live(self.model) as live:
                yield live
        finally:
            setattr(self._parent, self._name, self.layers)

    @staticmethod
    def _ids(batch: int, tokens: int) -> torch.Tensor:
        return torch.zeros(batch, tokens, dtype=torch.long)


class _Live(TorchDispatchMode):
    """Counts the bytes of live storages that operations have allocated; the model's own are left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[weakref.ref, int] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._sizes[weakref.ref(tensor.untyped_storage(), self._freed)] = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self._add(made.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        reference = weakref.ref(storage, self._freed)
        if reference not in self._sizes:
            self._sizes[reference] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _freed(self, reference: weakref.ref) -> None:
        self.now -= self._sizes.pop(reference, 0)


@contextmanager
def _without_torchs_log() -> Iterator[None]:
    """Inside the block torch does not print that an operation failed: it raises too, and then the memory is not predicted."""
    log = logging.getLogger(FakeTensorMode.__module__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def _one_sequence_a_row() -> Iterator[None]:
    """Inside the block transformers does not search the position ids, which are fake tensors, for packed sequences.

    Unable to tell, it would make explicit masks, with which attention repeats its keys and values for every query head.
    """
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def _forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


_RECENT: OrderedDict[object, DryRun] = OrderedDict()


def dry_run(config: PretrainedConfig, dtype: torch.dtype) -> DryRun:
    """The `DryRun` of such a model, the same one for equal configurations.

    The memory and the time of an analysis, the memory of the training after it, and the next method of a comparison all ask about
    one model; running it dry takes most of the time of a run whose model is small.

    Args:
        config: See `DryRun`.
        dtype: See `DryRun`.
    """
    said = {
        name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "transformers_version")
    }
    key = type(config), config._attn_implementation, dtype, json.dumps(said, sort_keys=True, default=str)
    found = _RECENT.pop(key, None) or DryRun(config, dtype)
    _RECENT[key] = found
    while len(_RECENT) > _KEPT:
        _RECENT.popitem(last=False)
    return found
