"""Hub id, folder or GGUF file -> a `Source`: found, checked and fingerprinted, but not loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sglp_llm.adapters import DecoderAdapter, adapter_names, adapter_of, get_adapter, text_config
from sglp_llm.adapters.structure.config_keys import PREDICTORS
from sglp_llm.adapters.structure.gguf_keys import WINDOWS
from sglp_llm.adapters.structure.wrappers import TEXT_KEY, loads_images
from sglp_llm.errors import UserError
from sglp_llm.models.gguf_header import check_gguf
from sglp_llm.models.hub import download
from sglp_llm.models.unchanged import FileStates
from sglp_llm.plan.plan_fields import MOST_LAYERS
from sglp_llm.records import ModelIdentity
from sglp_llm.small_files import check_regular_files, read_json
from sglp_llm.tensor_files import CheckpointIndex, read_index

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Keys of the number of layers, of experts, and of what else is built one by one.
_COUNTS_PARTS = re.compile(r"layers?$|experts?$|blocks?$|^depth$|codebooks?$|_group$|^n_shared|predict", re.IGNORECASE)
# Keys of the width of a matrix.
_WIDTHS = re.compile(r"hidden|vocab|inter|head|embd|inner|d_model|ffn|feed|dim$|rank", re.IGNORECASE)
MOST_WIDTH = 2**24
# Configuration keys that describe the software or the run, not the model.
_VOLATILE_KEYS = {"transformers_version", "torch_dtype", "dtype", "use_cache", "architectures", "auto_map"}
_VOLATILE_KEYS |= {"quantization_config"}
QUANTISED_KEYS = ("quantization_config", "compression_config", "quantization")
"""The keys under which transformers, compressed-tensors and MLX store how weights are quantised."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be pruned.

    Attributes:
        identity: Name, family and fingerprint.
        revision: The Hub commit; ``None`` for local files.
        path: The local folder, or the GGUF file.
        format: File format of the weights.
        raw_config: ``config.json`` as it is in the folder; empty for GGUF.
        config: transformers' resolved configuration.
        adapter: The family's adapter.
        index: Location of every tensor; ``None`` unless the weights are safetensors.
        predictor_layers: Number of layers for multi-token prediction that are stored behind the decoder layers.
        quantised: How the weights are quantised, such as ``GPTQ``; empty where they are not. Of GGUF it is empty too: it is
            loaded as plain weights.
        files: The files as they were before the first was read.
    """

    identity: ModelIdentity
    revision: str | None
    path: Path
    format: Literal["safetensors", "bin", "gguf"]
    raw_config: Mapping[str, Any]
    config: PretrainedConfig
    adapter: DecoderAdapter
    index: CheckpointIndex | None
    predictor_layers: int = 0
    quantised: str = ""
    files: FileStates = field(default_factory=FileStates)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(getattr(self.text_config, self.adapter.depth_key))

    @property
    def text_config(self) -> Any:
        """The configuration of the decoder; of a multimodal wrapper the nested one."""
        return text_config(self.config)

    @property
    def most_parameters(self) -> int:
        """The largest number of parameters that the files can hold: quantised ones of two bits, GGUF has types of fewer."""
        if self.index is not None:
            packed = 16 if self.quantised else 1  # in one number of 32 bits
            return packed * sum(entry.num_elements for entry in self.index.tensors.values())
        files = [self.path] if self.path.is_file() else self.path.glob("pytorch_model*.bin")
        return (8 if self.format == "gguf" else 1) * sum(file.stat().st_size for file in files)

    def check_apart(self, output: Path) -> None:
        """Checks that writing to ``output`` cannot change the source.

        Raises:
            UserError: One of the two is inside the other, or they are the same.
        """
        source, target = self.path.resolve(), output.resolve()
        if target.is_relative_to(source) or source.is_relative_to(target):
            raise UserError(f"{output}: the output must lie outside the source {self.path}, and must not contain it")


def find_source(name: str | Path, revision: str | None = None) -> Source:
    """Finds a checkpoint, downloads it where it is on the Hub, and checks that it can be pruned.

    Args:
        name: A local folder, a ``.gguf`` file, or the id of a model on the Hub.
        revision: Hub branch, tag or commit.

    Raises:
        UserError: It does not exist; its files are damaged; or it cannot be pruned: a PEFT adapter, in need of remote code, or of
            a type whose layers cannot be removed.
    """
    path, revision = _locate(name, revision, weights=True)
    files = FileStates.of(path)
    source = _gguf_source(path, str(name)) if path.is_file() else _folder_source(path, str(name), revision)
    return replace(source, files=files)


def find_config(
    name: str | Path, revision: str | None = None, quantised: bool = False
) -> tuple[PretrainedConfig, bool]:
    """The configuration of a model that can be pruned; weights are neither needed nor downloaded.

    Args:
        name: A local folder, with weights or without, a ``.gguf`` file, or the id of a model on the Hub.
        revision: Hub branch, tag or commit.
        quantised: Whether the weights may be quantised.

    Returns:
        transformers' resolved configuration, and whether the weights are GGUF.

    Raises:
        UserError: See `find_source`, except for errors in the weights.
    """
    path, _ = _locate(name, revision, weights=False)
    if path.is_file():
        return _gguf_source(path, str(name)).config, True
    raw = _raw_config(path)
    if (method := _quantised(raw)) and not quantised:
        raise UserError(
            f"{name}: the weights are quantised ({method}), and memory is predicted for unquantised ones; name the original"
        )
    return _checked_config(raw, path, str(name))[0], False


def depth_of(config: PretrainedConfig, adapter: DecoderAdapter, name: str) -> int:
    """The number of decoder layers that a configuration says.

    Raises:
        UserError: It is no such number.
    """
    depth = getattr(text_config(config), adapter.depth_key, None)
    if type(depth) is not int or not 1 <= depth <= MOST_LAYERS:
        raise UserError(f"{name}: {adapter.depth_key} must be a whole number in 1..{MOST_LAYERS}, not {depth!r}")
    return depth


def find_depth(name: str | Path, revision: str | None = None) -> int:
    """The number of decoder layers of a model that can be pruned, from its configuration.

    Raises:
        UserError: See `find_config`.
    """
    config, _ = find_config(name, revision, quantised=True)
    return depth_of(config, _adapter_of(config, str(name)), str(name))


def _locate(name: str | Path, revision: str | None, weights: bool) -> tuple[Path, str | None]:
    """The local folder or file, and the Hub commit where there is one."""
    path = Path(name).expanduser()
    local = path.exists() or path.suffix == ".gguf" or str(name).startswith(("/", "./", "../", "~"))
    if local and not path.exists():
        raise UserError(f"{name}: there is no such folder or file")
    if local and revision is not None:
        raise UserError(f"{name}: a revision is for models on the Hub, and this is a local path")
    path, revision = (path, revision) if local else download(str(name), revision, weights)
    check_regular_files(*((path,) if path.is_dir() else (path.parent, "*.json")))
    return path, revision


def fingerprint(config: PretrainedConfig, tensors: Iterable[tuple[str, str, Iterable[int]]]) -> str:
    """A hash that tells models apart, independent of their location and sharding.

    Of the configuration, only settings that differ from the family's defaults count: when transformers saves a checkpoint
    again, with other shards for instance, it writes out defaults that the JSON lacked before.

    Args:
        config: The resolved configuration.
        tensors: Name, dtype and shape of every tensor, in any order.
    """
    defaults = type(config)().to_dict()
    changed = {key: value for key, value in config.to_dict().items() if key not in defaults or value != defaults[key]}
    stable = {key: value for key, value in changed.items() if key not in _VOLATILE_KEYS and not key.startswith("_")}
    headers = sorted([name, dtype, list(shape)] for name, dtype, shape in tensors)
    text = json.dumps([config.model_type, stable, headers], sort_keys=True, default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _folder_source(folder: Path, name: str, revision: str | None) -> Source:
    raw = _raw_config(folder)
    config, adapter = _checked_config(raw, folder, name)
    index, predictors = None, 0
    if any((folder / file).exists() for file in ("model.safetensors", "model.safetensors.index.json")):
        index = read_index(folder)
        predictors = _check_layers(index, adapter, config, name)
        headers = [(entry.name, entry.dtype, entry.shape) for entry in index.tensors.values()]
    elif files := sorted(folder.glob("pytorch_model*.bin")):
        # Tensor names and shapes would need unpickling; file names and sizes are known without.
        headers = [(file.name, "bin", (file.stat().st_size,)) for file in files]
    else:
        raise UserError(
            f"{folder}: no weights: expected model.safetensors, its shards with an index, or pytorch_model.bin"
        )
    identity = ModelIdentity(name, str(raw["model_type"]), fingerprint(config, headers))
    form: Literal["safetensors", "bin"] = "safetensors" if index else "bin"
    return Source(identity, revision, folder, form, raw, config, adapter, index, predictors, _quantised(raw))


def _quantised(raw: Mapping[str, Any]) -> str:
    """How weights are quantised, by ``config.json``; empty where they are not."""
    nested = raw.get(TEXT_KEY)
    for each in (raw, nested if isinstance(nested, dict) else {}):
        for key in QUANTISED_KEYS:
            if found := each.get(key):
                method = found.get("quant_method") if isinstance(found, dict) else found
                return str(method or key).upper()
    return ""


def _gguf_source(path: Path, name: str) -> Source:
    from gguf import GGUFReader

    if path.suffix != ".gguf":
        raise UserError(f"{path}: expected a folder or a .gguf file")
    check_gguf(path)
    try:
        reader = GGUFReader(path)
        tensors = [(t.name, t.tensor_type.name, [int(n) for n in t.shape]) for t in reader.tensors]
        with_window = next((f.contents() for key, f in reader.fields.items() if key.endswith(f".{WINDOWS}")), None)
    except Exception as error:  # the reader trusts its input: damage surfaces as any kind of exception
        raise UserError(f"{path}: not a whole GGUF file ({' '.join(str(error).split())})") from None
    config = _resolved_config(path.parent, name, gguf_file=path.name)
    if isinstance(with_window, list) and len(with_window) == len(getattr(config, "layer_types", None) or ()):
        # transformers derives them from the depth, which is wrong once layers were removed.
        config.layer_types = ["sliding_attention" if flag else "full_attention" for flag in with_window]
    adapter = _adapter_of(config, name)
    _refuse_settings(config.to_dict(), adapter, name)
    depth_of(config, adapter, name)
    identity = ModelIdentity(name, config.model_type, fingerprint(config, tensors))
    return Source(identity, None, path, "gguf", {}, config, adapter, None)


def _raw_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not os.path.lexists(file):
        if (folder / "adapter_config.json").exists():
            raise UserError(
                f"{folder}: a PEFT adapter, not a model; `sglp-llm prune --merge-adapter FOLDER` merges it into its base first"
            )
        raise UserError(f"{folder}: no config.json; expected the folder of a transformers checkpoint")
    raw = read_json(file, "configuration")
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise UserError(f"{file}: no model_type; expected the configuration of a transformers model")
    _refuse_counts(raw, file)
    return raw


def _refuse_counts(raw: Mapping[str, Any], file: Path) -> None:
    """Refuses numbers of parts that no model has, before transformers makes a list of so many."""
    for key, value in raw.items():
        if type(value) is int and abs(value) > MOST_LAYERS and _COUNTS_PARTS.search(key):
            raise UserError(f"{file}: {key} is {value}, and no model has more than {MOST_LAYERS}")
        if type(value) is int and abs(value) > MOST_WIDTH and _WIDTHS.search(key):
            raise UserError(f"{file}: {key} is {value}, and no model is wider than {MOST_WIDTH}")
        if type(value) is int and abs(value) >= 2**63 and not key.endswith("length"):
            raise UserError(f"{file}: {key} is a number of {len(str(abs(value)))} digits, which no model has")


def _checked_config(raw: Mapping[str, Any], folder: Path, name: str) -> tuple[PretrainedConfig, DecoderAdapter]:
    """The resolved configuration and the adapter of a checkpoint whose layers can be removed."""
    model_type = str(raw["model_type"])
    written = get_adapter(model_type) if model_type in adapter_names() else None
    _refuse_form(raw, written, name)
    if written is None:
        _refuse_type(model_type, name)
    _refuse_architecture(raw, name)
    if written is not None:
        _refuse_settings(raw, written, name)
        return _resolved_config(folder, name), written
    config = _resolved_config(folder, name)
    adapter = _adapter_of(config, name)
    _refuse_settings(raw if text_config(config) is config else text_config(config).to_dict(), adapter, name)
    return config, adapter


def _adapter_of(config: PretrainedConfig, name: str) -> DecoderAdapter:
    try:
        return adapter_of(config)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _refuse_form(raw: Mapping[str, Any], adapter: DecoderAdapter | None, name: str) -> None:
    """Refuses remote code and wrappers that are no models of images and text."""
    model_type = str(raw["model_type"])
    if remote := raw.get("auto_map"):
        native = adapter.native_remote_classes if adapter else _built_in(model_type)
        entries = list(remote.values()) if isinstance(remote, dict) else [remote]
        classes = [str(entry).split(".")[-1] for value in entries for entry in _as_list(value) if entry]
        if not {_letters(name) for name in classes} <= {_letters(name) for name in native}:
            raise UserError(
                f"{name}: the checkpoint needs remote code (auto_map: {', '.join(classes)}), which is not run; "
                "use a conversion to a model family of transformers"
            )
    wrapped = [key for key in ("text_config", "vision_config", "audio_config") if key in raw]
    if wrapped and not loads_images(model_type):
        text = raw.get("text_config")
        inner = text.get("model_type", f"{model_type}_text") if isinstance(text, dict) else f"{model_type}_text"
        raise UserError(
            f"{name}: {model_type!r} is a multimodal wrapper (it has {', '.join(wrapped)}), but no model of images and text; "
            f"save its text model ({inner}) as a checkpoint of its own and point at that"
        )


def _letters(name: str) -> str:
    """A class name as it is compared: transformers and checkpoints put underscores and capitals in other places."""
    return name.replace("_", "").lower()


def _built_in(model_type: str) -> set[str]:
    """The classes that transformers itself has for a type: checkpoints from before then name code of the same names."""
    from transformers.models.auto import configuration_auto, modeling_auto

    mappings = (
        configuration_auto.CONFIG_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return {name for mapping in mappings for name in _as_list(mapping.get(model_type)) if name}


def _refuse_type(model_type: str, name: str) -> None:
    """Refuses a type of which transformers has no causal language model, nor one of images and text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not loads_images(model_type):
        near = get_close_matches(model_type.lower(), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1, cutoff=0.5)
        raise UserError(
            f"{name}: unknown model family (model_type) {model_type!r}{f'; did you mean {near[0]!r}?' if near else '.'} "
            "transformers has no causal language model of this type; `sglp-llm ls adapters` lists those that it has"
        )


def _refuse_architecture(raw: Mapping[str, Any], name: str) -> None:
    """Refuses a classifier or a bare decoder: without a language model head, transformers would initialise a random one."""
    from transformers.models.auto import modeling_auto

    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    is_wrapped = TEXT_KEY in raw or "vision_config" in raw
    model_type = raw["model_type"]
    of_type = mappings[is_wrapped].get(model_type) or mappings[not is_wrapped][model_type]
    causal = _as_list(of_type)
    named = [str(architecture) for architecture in _as_list(raw.get("architectures") or [])]
    if named and not set(named) & set(causal):
        raise UserError(
            f"{name}: the checkpoint is a {' and '.join(named)} (architectures), not the causal language model "
            f"{' or '.join(causal)}"
        )


def _refuse_settings(config: Mapping[str, Any], adapter: DecoderAdapter, name: str) -> None:
    for key, reason in adapter.refuse.items():
        if config.get(key):
            raise UserError(f"{name}: {key} is set, and such a model cannot be pruned: {reason}")


def _resolved_config(folder: Path, name: str, **options: str) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # transformers validates with exceptions of many libraries; all mean that it is invalid
        raise UserError(
            f"{name}: transformers cannot read the configuration ({' '.join(str(error).split())[:300]})"
        ) from None


def _check_layers(index: CheckpointIndex, adapter: DecoderAdapter, config: PretrainedConfig, name: str) -> int:
    """Checks that every decoder layer is there; returns how many layers for multi-token prediction follow them."""
    num_layers = depth_of(config, adapter, name)
    text = text_config(config)
    allowed = max((int(getattr(text, key, None) or 0) for key in PREDICTORS), default=0)
    matches = (adapter.layer_key_pattern.match(tensor) for tensor in index.tensors)
    stored = {int(match[2]) for match in matches if match}
    missing, extra = sorted(set(range(num_layers)) - stored), sorted(stored - set(range(num_layers)))
    if missing or (extra and extra[-1] >= num_layers + allowed):
        what = f"layer {missing[0]} has no tensors" if missing else f"there are tensors of layer {extra[0]}"
        raise UserError(f"{name}: config.json says {num_layers} decoder layers, but {what}")
    return len(extra)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
