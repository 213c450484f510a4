"""A model to prune: a checkpoint that is loaded on first use, or the caller's live model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sglp_llm.adapters import text_config
from sglp_llm.errors import UserError
from sglp_llm.method.staying import Staying
from sglp_llm.models.finite import check_finite
from sglp_llm.models.footprint import footprint_of
from sglp_llm.models.loading import (
    DecoderModel,
    check_streamable,
    checkpoint_dtype,
    load_model,
    load_streamed,
    load_tokenizer,
    stored_dtype,
    wrap_model,
)
from sglp_llm.models.source import Source, find_source, fingerprint
from sglp_llm.models.staying import staying_of
from sglp_llm.records import Footprint, ModelIdentity


class OpenedModel:
    """A model to prune, opened without loading its weights.

    Args:
        model: Hub id, folder, ``.gguf`` file, or a live causal language model of transformers.
        revision: Of a model on the Hub.
        dtype: See `load_model`.
        device_map: See `load_model`.
        tokenizer: Used instead of the checkpoint's own; needed with a live model if text is read.

    Attributes:
        source: The checkpoint; ``None`` for a live model.
        identity: Name, family and fingerprint.
        adapter: The family's adapter.
        num_layers: Number of decoder layers.
        config: transformers' configuration.
        streamed: Whether the decoder layers are loaded one at a time.
        state_bytes: See `DecoderModel`, for the model that `load` returns; set it before that.

    Raises:
        UserError: See `find_source` and `wrap_model`.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        revision: str | None = None,
        dtype: str = "auto",
        device_map: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._dtype, self._device_map, self._tokenizer = dtype, device_map, tokenizer
        self._scratch: Path | None = None
        self.streamed = False
        self.state_bytes: int | None = None
        self._loaded: DecoderModel | None = None
        self._is_checked = False
        self.source: Source | None = None
        if isinstance(model, PreTrainedModel):
            self._loaded = wrap_model(model)
            self.identity = _live_identity(model)
            self.adapter = self._loaded.adapter
            self.num_layers = self._loaded.num_layers
            self.config = model.config
        else:
            self.source = find_source(model, revision)
            self.identity = self.source.identity
            self.adapter = self.source.adapter
            self.num_layers = self.source.num_layers
            self.config = self.source.config

    def alike(self, model: str | Path, dtype: str | None = None) -> OpenedModel:
        """Another model, opened with the same placement and tokenizer, and the same dtype unless another is given.

        Raises:
            UserError: See `find_source`.
        """
        return OpenedModel(model, None, dtype or self._dtype, self._device_map, self._tokenizer)

    @property
    def revision(self) -> str | None:
        """The Hub commit, where there is one."""
        return self.source.revision if self.source else None

    @property
    def card(self) -> Path | None:
        """Where the checkpoint's model card would be; ``None`` for a live model."""
        return self.source.path / "README.md" if self.source else None

    @property
    def setting(self) -> dict[str, str | None]:
        """Identifies the model in a journal; includes the name, because fine-tuned copies share a fingerprint."""
        return {"model": self.identity.name, "fingerprint": self.identity.fingerprint, "revision": self.revision}

    def unchanged_files(self) -> AbstractContextManager[None]:
        """A block in which the files must stay as they were when the model was opened; a live model has none.

        Raises:
            UserError: One has changed or is gone, at the end of the block or in place of the error that came of it.
        """
        return self.source.files.staying() if self.source else nullcontext()

    @property
    def staying(self) -> Staying:
        """Which of its layers must stay."""
        return staying_of(self.config, self.adapter, self.num_layers)

    @property
    def text_config(self) -> Any:
        """The configuration of the decoder; of a multimodal wrapper the nested one."""
        return text_config(self.config)

    def check_tokens(self, input_ids: torch.Tensor) -> None:
        """Checks that token ids, ``[sequences, tokens]``, are in the model's vocabulary.

        Raises:
            UserError: One is not: the tokenizer is not the model's.
        """
        vocabulary = int(self.text_config.vocab_size)
        if (highest := int(input_ids.max())) >= vocabulary:
            raise UserError(
                f"{self.identity.name}: the tokenizer does not belong to the model: "
                f"it gives the token id {highest}, and the model knows 0..{vocabulary - 1}"
            )

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype in which a decoder layer's parameter, by its name in the model, is exported; as stored for safetensors."""
        if self.source is None or self.source.index is None:
            dtype: torch.dtype = self.load().model.dtype
            return dtype
        return stored_dtype(self.source, name)

    @property
    def can_stream(self) -> bool:
        """Whether `stream` would not refuse the model itself: safetensors, which accelerate does not place."""
        return self.source is not None and self.source.index is not None and self._device_map is None

    def stream(self, scratch: str | Path | None = None) -> None:
        """Makes `load` return a model whose decoder layers are loaded one at a time; to be called before it.

        Args:
            scratch: Folder for the hidden states between layers; ``None`` means host memory.

        Raises:
            UserError: The model is live, is placed by accelerate, or its weights are not safetensors; or there is no such folder.
        """
        folder = None if scratch is None else Path(scratch).expanduser()
        if folder is not None and not folder.is_dir():
            raise UserError(f"scratch: {scratch} is not a folder; make it first")
        if self.source is None:
            raise UserError("a live model is in memory already: the streamed engine is for checkpoints")
        if self._device_map is not None:
            raise UserError("device_map places a whole model, and the streamed engine one layer: leave one of them out")
        check_streamable(self.source)
        self.streamed, self._scratch = True, folder

    def load(self) -> DecoderModel:
        """The model in memory; loaded on the first call.

        Raises:
            UserError: The weights cannot be read, or hold numbers that are not finite.
        """
        loaded = self._loaded
        if loaded is None:
            assert self.source is not None
            if self.streamed:
                loaded = load_streamed(self.source, self._dtype, self._scratch)
            else:
                loaded = load_model(self.source, self._dtype, self._device_map)
        if not self._is_checked:
            check_finite(self.identity.name, self.adapter.layers, loaded.model.named_parameters())
            self._is_checked = True
        if loaded.state_bytes != self.state_bytes:
            loaded = replace(loaded, state_bytes=self.state_bytes)
        self._loaded = loaded
        return loaded

    def footprint(self) -> Footprint:
        """What the model takes in memory, in the dtype that plain transformers loads an exported checkpoint in; loads it."""
        decoder = self.load()
        if self.source is None or self.source.index is None:
            return footprint_of(decoder, decoder.model.dtype)
        return footprint_of(decoder, checkpoint_dtype(self.source))

    @property
    def is_loaded(self) -> bool:
        """Whether `load` has been called, and `release` not since; of a live model always."""
        return self._loaded is not None

    def release(self) -> None:
        """Releases weights that `load` has loaded; a live model is kept, because it is the caller's."""
        if self.source is not None:
            self._loaded = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; loaded on the first use.

        Raises:
            UserError: A live model was given without one, or the checkpoint's cannot be read.
        """
        if self._tokenizer is None:
            if self.source is None:
                raise UserError(
                    "a live model needs tokenizer=... (or a CalibrationSet) so that calibration text can be read"
                )
            self._tokenizer = load_tokenizer(self.source)
        return self._tokenizer

    def save_tokenizer(self, folder: Path) -> None:
        """Saves the tokenizer, where there is one, with its chat template."""
        if self._tokenizer is not None or self.source is not None:
            self.tokenizer.save_pretrained(folder)


def _live_identity(model: PreTrainedModel) -> ModelIdentity:
    tensors = ((name, str(tensor.dtype), tensor.shape) for name, tensor in model.state_dict().items())
    name = model.config.name_or_path or type(model).__name__
    return ModelIdentity(name, model.config.model_type, fingerprint(model.config, tensors))
