"""Loads the model and the tokenizer of a `Source`, and places the model on its devices."""

from __future__ import annotations

import pickle
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from sglp_llm.adapters import DecoderAdapter, adapter_of, auto_class, text_config
from sglp_llm.adapters.structure.empty import without_weights
from sglp_llm.errors import UserError, is_failure
from sglp_llm.models.devices import own_device
from sglp_llm.models.hub import download
from sglp_llm.models.layer_weights import LayerWeights
from sglp_llm.models.modes import has_fast_bfloat16
from sglp_llm.models.source import Source
from sglp_llm.small_files import check_regular_files

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}

_SLACK = 10**6  # parameters: what some types initialise, and do not store

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


_ELSEWHERE = "make the plan on the unquantised model, and give it here with --plan"


@dataclass(frozen=True)
class DecoderModel:
    """A causal language model, with access to its decoder layers.

    Attributes:
        model: Any transformers ``...ForCausalLM``, or a multimodal wrapper of one.
        adapter: The family's adapter.
        unused_tensors: Names of the checkpoint's tensors that transformers does not use, such as the causal masks that old
            releases stored.
        weights: Loads the decoder layers' weights when they are in memory one at a time; ``None`` when all are in memory.
        state_bytes: Most bytes of stored hidden states that may stay on its device; ``None`` where nothing was predicted.
    """

    model: PreTrainedModel
    adapter: DecoderAdapter
    unused_tensors: Set[str] = frozenset()
    weights: LayerWeights | None = None
    state_bytes: int | None = None

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, front to back."""
        layers = self.model.get_submodule(self.adapter.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def config(self) -> Any:
        """The configuration of the decoder; of a multimodal wrapper the nested one."""
        return text_config(self.model.config)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def input_device(self) -> torch.device:
        """Where token ids must be.

        Raises:
            UserError: accelerate keeps the input embeddings out of memory.
        """
        weight: torch.Tensor = self.model.get_input_embeddings().weight
        if weight.is_meta:
            raise UserError(
                "the model does not fit: its input embeddings were offloaded; use --engine streamed, --dtype bfloat16, or a "
                "larger machine"
            )
        return weight.device

    @property
    def num_parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def refuse_quantised(source: Source | None, what: str) -> None:
    """Refuses what cannot be done with quantised weights.

    Args:
        source: The checkpoint; ``None`` for a live model.
        what: What is to be done, as the beginning of a sentence.

    Raises:
        UserError: The weights are quantised.
    """
    if source is not None and source.quantised:
        raise UserError(
            f"{source.identity.name}: the weights are quantised ({source.quantised}): {what} needs unquantised ones; {_ELSEWHERE}"
        )


def wrap_model(model: PreTrainedModel) -> DecoderModel:
    """Wraps a live transformers model.

    Raises:
        UserError: Layers of such a model cannot be removed, or a model with one of its settings cannot be pruned.
    """
    adapter = adapter_of(model.config)
    for key, reason in adapter.refuse.items():
        if getattr(text_config(model.config), key, None):
            raise UserError(f"{key} is set, and such a model cannot be pruned: {reason}")
    return DecoderModel(model, adapter)


def load_model(source: Source, dtype: str = "auto", device_map: str | None = None) -> DecoderModel:
    """Loads the weights.

    Args:
        source: The result of `find_source`.
        dtype: ``auto`` keeps the checkpoint's own (for GGUF `gguf_dtype`), or one of `DTYPES`.
        device_map: accelerate's placement; ``None`` puts everything on the GPU where there is one, else on the CPU.

    Raises:
        UserError: A tensor is missing or damaged.
    """
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype, "auto")}
    if device_map is not None:
        options["device_map"] = device_map
    elif torch.cuda.is_available() and source.format == "safetensors":
        # Tensor by tensor: the whole model is never in host memory.
        options["device_map"] = {"": str(own_device())}
    folder = source.path
    if source.format == "gguf":
        folder = source.path.parent
        options |= {"gguf_file": source.path.name, "dtype": DTYPES.get(dtype) or gguf_dtype(), "config": source.config}
    name = source.identity.name
    check_size(source)
    try:
        # Otherwise the exception only says that sizes do not match, and refers to a report that is logged elsewhere.
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, report = auto_class(source.config).from_pretrained(folder, trust_remote_code=False, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch, pickle, safetensors and transformers each have their own for a damaged file
        if source.format == "bin" and isinstance(error, pickle.UnpicklingError | RuntimeError | EOFError):
            # torch's own message advises to load with weights_only=False, which would run what is in the file.
            raise UserError(f"{name}: a .bin file is damaged, or holds code beside tensors, which is not run") from None
        hint = f"; {_ELSEWHERE}" if source.quantised else ""
        raise UserError(f"{name}: transformers cannot load the weights ({_one_line(error)}){hint}") from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{name}: the checkpoint lacks {len(missing)} tensors, {missing[0]!r} for one")
    if mismatched := sorted(report["mismatched_keys"], key=str):
        tensor, stored, expected = mismatched[0]
        raise UserError(
            f"{name}: tensor {tensor!r} has the shape {list(stored)}, and {list(expected)} by the configuration"
        )
    vars(model.config).pop("auto_map", None)  # it would be saved with the model, and name code that is not
    if source.format == "gguf":
        model = _dequantised(model)
    if "device_map" not in options and torch.cuda.is_available():
        model = model.to(own_device())
    return DecoderModel(model.eval(), source.adapter, frozenset(report["unexpected_keys"]))


def gguf_dtype() -> torch.dtype:
    """What the quantised weights of a GGUF file become: bfloat16 on a GPU, which is short of memory and not of bfloat16."""
    return torch.bfloat16 if has_fast_bfloat16() and torch.cuda.is_available() else torch.float32


def check_size(source: Source) -> None:
    """Checks that the files can hold the model of the configuration, before memory is taken for it.

    Raises:
        UserError: They are too small, or transformers cannot make such a model.
    """
    name = source.identity.name
    try:
        with torch.device("meta"):
            model = auto_class(source.config).from_config(source.config)
    except Exception as error:  # each type's own code
        raise UserError(f"{name}: transformers cannot make a model of the configuration ({_one_line(error)})") from None
    needed, stored = sum(parameter.numel() for parameter in model.parameters()), source.most_parameters
    if needed > 2 * stored + _SLACK:
        raise UserError(
            f"{name}: the configuration is that of a model of {needed} parameters, and the files hold at most {stored}"
        )


def check_streamable(source: Source) -> None:
    """Checks that the layers can be loaded one at a time.

    Raises:
        UserError: The checkpoint is not safetensors, or quantised.
    """
    if source.quantised:
        raise UserError(
            f"{source.identity.name}: the streamed engine reads unquantised weights, and these are {source.quantised}"
        )
    if source.index is None:
        raise UserError(
            f"{source.identity.name}: the streamed engine reads safetensors files, and this is a {source.format} checkpoint; "
            "use --engine resident, or save it as safetensors first"
        )


def load_streamed(source: Source, dtype: str = "auto", scratch: Path | None = None) -> DecoderModel:
    """A model whose decoder layers are loaded from the files one at a time, when they are used.

    Embeddings, final norm and head are loaded at once; on the CPU they too are views of the memory-mapped files.

    Args:
        source: The result of `find_source`.
        dtype: See `load_model`.
        scratch: Folder for the hidden states between layers; ``None`` keeps them in memory.

    Raises:
        UserError: The checkpoint is not safetensors, or a tensor is missing or has the wrong shape.
    """
    check_streamable(source)
    check_size(source)
    with without_weights():
        model = auto_class(source.config).from_config(
            source.config, dtype=DTYPES.get(dtype) or checkpoint_dtype(source)
        )
    weights = LayerWeights(source, model.eval(), own_device(), scratch)
    return DecoderModel(model, source.adapter, weights.unused_tensors, weights)


def checkpoint_dtype(source: Source) -> torch.dtype:
    """What transformers' ``dtype="auto"`` means for safetensors: the configuration's, or the first floating point tensor's."""
    assert source.index is not None
    if isinstance(named := getattr(source.config, "dtype", None), torch.dtype):
        return named
    return next(
        (_FLOATS[entry.dtype] for entry in source.index.tensors.values() if entry.dtype in _FLOATS), torch.float32
    )


def stored_dtype(source: Source, name: str) -> torch.dtype:
    """The dtype in which a safetensors checkpoint stores a parameter of a decoder layer.

    Args:
        source: The result of `find_source`.
        name: The parameter's name in the model. Where the files use other names, such as one matrix per expert, the dtype of
            the layer's first tensor is taken.
    """
    assert source.index is not None
    pattern = source.adapter.layer_key_pattern
    wanted = pattern.match(name)
    assert wanted is not None
    found = {}
    for entry in source.index.tensors.values():
        match = pattern.match(entry.name)
        if match is not None and match[2] == wanted[2] and entry.dtype in _FLOATS:
            found[match[3]] = _FLOATS[entry.dtype]
    return found.get(wanted[3]) or next(iter(found.values()), None) or checkpoint_dtype(source)


def load_tokenizer(source: Source) -> Any:
    """Loads the source's tokenizer.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    folder, options = source.path, {}
    if folder.is_dir() and not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        raise UserError(f"{source.identity.name}: there is no tokenizer in the folder (tokenizer.json and others)")
    if source.format == "gguf":
        folder, options = source.path.parent, {"gguf_file": source.path.name}
    return _tokenizer(folder, source.identity.name, **options)


def find_tokenizer(name: str | Path) -> Any:
    """Loads the tokenizer of a folder, or of a model on the Hub; weights are not downloaded.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    path = Path(name).expanduser()
    return _tokenizer(path if path.is_dir() else download(str(name), None, tokenizer=True)[0], str(name))


def _tokenizer(folder: Path, name: str, **options: str) -> Any:
    try:
        check_regular_files(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        tokenizer("a")  # some damage is seen on the first use
    except UserError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{name}: the tokenizer needs remote code (auto_map), which is not run: name another one with --tokenizer, "
                "or give token ids as the calibration, in Python"
            ) from None
        raise UserError(f"{name}: transformers cannot load the tokenizer ({_one_line(error)})") from None
    return tokenizer


def _dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model without a quantisation configuration, with which transformers would refuse to save it."""
    config = model.config
    del config.quantization_config
    with without_weights():
        plain = auto_class(config).from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    if placement := getattr(model, "hf_device_map", None):
        from accelerate import dispatch_model

        plain = dispatch_model(plain, placement)
    return plain


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
