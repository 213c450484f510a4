"""The weights of a model whose decoder layers are in memory one at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from sglp_llm.errors import UserError
from sglp_llm.models.finite import check_finite
from sglp_llm.models.source import Source
from sglp_llm.tensor_files import TensorEntry
from sglp_llm.tensor_files.mapped import forget_pages, mapped_tensor


class LayerWeights:
    """Loads the weights of one decoder layer at a time into a model that was built without weights.

    Weights that need no conversion and stay on the CPU are views of the memory-mapped files. Names and layouts that differ
    from the modules' (stacked experts, missing prefixes) are converted by transformers' own loader, layer by layer.

    A forward pass of the model works at any time: a layer that is not in memory is loaded when it is called, and released
    afterwards. `layer` is for callers that use a layer more than once, or need gradients.

    Args:
        source: A safetensors checkpoint.
        model: The model, every parameter on the meta device.
        device: Where the weights are loaded to.
        scratch: Folder in which engines store hidden states; ``None`` keeps them in host memory.

    Attributes:
        scratch: See above.
        unused_tensors: Names of tensors that transformers does not use, including those of the layers loaded so far.

    Raises:
        UserError: A tensor is missing or has the wrong shape.
    """

    def __init__(self, source: Source, model: PreTrainedModel, device: torch.device, scratch: Path | None) -> None:
        assert source.index is not None
        self.scratch = scratch
        self.unused_tensors: set[str] = set()
        self._name, self._model, self._device = source.identity.name, model, device
        self._path = source.adapter.layers
        self._layers = model.get_submodule(self._path)
        self._conversions = get_model_conversion_mapping(model)
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._empty = [dict(layer.named_parameters()) for layer in self._layers]
        self._present: set[int] = set()
        self._finite: set[int] = set()  # layers whose numbers have been looked at
        self._replaced: dict[str, torch.Tensor] = {}
        self._prefetcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._coming: dict[int, Future[None]] = {}
        self._entries: dict[int | None, list[TensorEntry]] = defaultdict(list)
        for entry in source.index.tensors.values():
            match = source.adapter.layer_key_pattern.match(entry.name)
            self._entries[int(match[2]) if match else None].append(entry)
        self._outside: list[mmap] = []  # memory maps of the tensors outside the decoder layers
        self._bring(None)
        model.tie_weights()
        inside = {id(parameter) for layer in self._layers for parameter in layer.parameters()}
        self._check((name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in inside)
        for name, buffer in model.named_buffers():
            _set(model, name, buffer.to(device))
        for index, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(self._fetch_for(index))
            layer.register_forward_hook(self._drop_for(index), always_call=True)
        self._borrowed: set[int] = set()  # layers that the forward hooks have loaded for one call

    @contextmanager
    def layer(self, index: int, following: int | None = None) -> Iterator[nn.Module]:
        """Inside the block a layer's weights are in memory, and those of ``following`` are prefetched in the background.

        Raises:
            UserError: A tensor of the layer is missing or has the wrong shape.
        """
        self._fetch(index)
        if following is not None and following not in self._coming:
            self._coming[following] = self._prefetcher.submit(self._load, following)
        try:
            yield self._layers[index]
        finally:
            self._drop(index)

    def replace(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Uses these values instead of the stored ones, by parameter name, until the next call; returns the previous ones.

        Only for parameters of decoder layers, and only while no layer is in memory.
        """
        assert not self._present
        self.close()
        before, self._replaced = self._replaced, dict(tensors)
        return before

    def rest(self) -> None:
        """Releases the resident pages of the memory-mapped embeddings and head; they are read again on the next use."""
        forget_pages(self._outside)

    def close(self) -> None:
        """Releases prefetched layers that will not be used."""
        for index, future in list(self._coming.items()):
            future.exception()
            del self._coming[index]
            self._drop(index)

    def _fetch(self, index: int) -> None:
        coming = self._coming.pop(index, None)
        if coming is not None:
            coming.result()
        else:
            self._load(index)
        self._present.add(index)

    def _load(self, index: int) -> None:
        layer = self._layers[index]
        self._bring(index)
        for name, parameter in self._empty[index].items():
            if (value := self._replaced.get(self._path_of(index, name))) is not None:
                value = self._sent({name: value.to(self._model.dtype)})[name]
                _set(layer, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        self._check((f"layer {index}: {name}", parameter) for name, parameter in layer.named_parameters())
        if index not in self._finite:
            found = ((self._path_of(index, name), parameter) for name, parameter in layer.named_parameters())
            check_finite(self._name, self._path, found)
            self._finite.add(index)

    def _path_of(self, index: int, name: str) -> str:
        return f"{self._path}.{index}.{name}"

    def _drop(self, index: int) -> None:
        self._present.discard(index)
        for name, parameter in self._empty[index].items():
            _set(self._layers[index], name, parameter)

    def _bring(self, index: int | None) -> None:
        """Loads the tensors of one layer into the model; ``None`` loads everything outside the decoder layers."""
        settings = LoadStateDictConfig(
            device_map={"": self._device},
            dtype=self._model.dtype,
            dtype_plan=self._model._get_dtype_plan(self._model.dtype),
            weight_mapping=self._conversions,
        )
        with _no_progress_bar, torch.inference_mode(False):
            outside = self._outside if index is None else None
            tensors = self._sent({entry.name: mapped_tensor(entry, outside) for entry in self._entries[index]})
            report, _ = convert_and_load_state_dict_in_model(self._model, tensors, settings)
        if report.conversion_errors:
            name, error = next(iter(report.conversion_errors.items()))
            raise UserError(
                f"{self._name}: transformers cannot convert {name!r} ({' '.join(str(error).split())[:300]})"
            )
        if mismatched := sorted(report.mismatched_keys, key=str):
            tensor, stored, expected = mismatched[0]
            raise UserError(
                f"{self._name}: tensor {tensor!r} has the shape {list(stored)}, and {list(expected)} by the configuration"
            )
        self.unused_tensors |= report.unexpected_keys

    def _sent(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors in host memory on the device, where there is one: from pinned memory, by a stream of their own.

        On the default stream a copy would wait for everything that the device has yet to compute, and the other way round.
        """
        if self._copying is None:
            return tensors
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copying):
            sent = {name: each.pin_memory().to(self._device, non_blocking=True) for name, each in tensors.items()}
        self._copying.synchronize()
        for each in sent.values():  # their memory must not be used again while the layer computes
            each.record_stream(computing)
        return sent

    def _check(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        if missing := [name for name, parameter in parameters if parameter.device.type == "meta"]:
            raise UserError(f"{self._name}: the checkpoint lacks {len(missing)} tensors, {missing[0]!r} for one")

    def _fetch_for(self, index: int) -> Any:
        def hook(layer: nn.Module, *_: Any) -> None:
            # Where ``forward`` is replaced, to record the layer's arguments, its weights are not needed.
            if index not in self._present and "forward" not in vars(layer):
                self._fetch(index)
                self._borrowed.add(index)

        return hook

    def _drop_for(self, index: int) -> Any:
        def hook(*_: Any) -> None:
            if index in self._borrowed:
                self._borrowed.discard(index)
                self._drop(index)

        return hook


class _NoProgressBar:
    """Hides transformers' progress bar, one per layer. Its switch is global and two threads load layers, hence the lock."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._shown = True

    def __enter__(self) -> None:
        self._lock.acquire()
        self._shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        if self._shown:
            logging.enable_progress_bar()
        self._lock.release()


_no_progress_bar = _NoProgressBar()


def _set(module: nn.Module, name: str, value: Any) -> None:
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    (owner._buffers if attribute in owner._buffers else owner._parameters)[attribute] = value
