"""Writes a shortened GGUF file: the kept layers' quantised tensors bit for bit under new names, and metadata that fits them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglp_llm.adapters.structure.config_keys import PER_LAYER
from sglp_llm.adapters.structure.gguf_keys import (
    LAYER_TENSOR,
    OTHER_MODEL_AT,
    PERIODS,
    REGULAR,
    WINDOWS,
    cut,
    windows,
)
from sglp_llm.checkpoint.publish import check_output
from sglp_llm.checkpoint.publish_file import check_file
from sglp_llm.checkpoint.shorten import shortened_copy
from sglp_llm.errors import UserError
from sglp_llm.models import Source
from sglp_llm.plan import plan_to_dict
from sglp_llm.plan.published import without_local_paths
from sglp_llm.progress import Progress, silent
from sglp_llm.records import PrunePlan

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter, ReaderField
    from transformers import PretrainedConfig

PLAN_KEY = "sglp_llm.plan"
"""Metadata key of the plan, as JSON."""

_NOT_COPIED = frozenset({"general.architecture", "general.size_label", "general.parameter_count", PLAN_KEY})
"""What the writer sets itself, and what is said of the whole model."""


def is_gguf(output: Path) -> bool:
    """Whether an output is a GGUF file and no folder."""
    return output.suffix == ".gguf"


def check_shortened_output(output: Path, overwrite: bool = False) -> None:
    """Refuses, before any work is done, a folder or GGUF file that could not be made.

    Raises:
        UserError: See `check_output` and `check_file`.
    """
    (check_file if is_gguf(output) else check_output)(output, overwrite)


def check_gguf_source(model: object, output: Path) -> None:
    """Checks, before the model is opened, that a GGUF file can be made of it.

    Raises:
        UserError: It is none itself.
    """
    if not isinstance(model, str | Path) or Path(model).suffix != ".gguf":
        raise UserError(
            f"{output}: a GGUF file is made of a GGUF file, and the model is none: "
            "write a folder, and then `sglp-llm export FOLDER --to gguf`"
        )


def export_gguf(source: Source, plan: PrunePlan, file: Path, progress: Progress = silent) -> tuple[str, ...]:
    """Copies a GGUF file without the removed layers. Memory does not grow with its size.

    The plan is added, without paths.

    Args:
        source: A GGUF source.
        plan: A plan that fits the source, see `check_plan`.
        file: The file to write.
        progress: Reports written bytes.

    Returns:
        What a user of the file must know, one line each.

    Raises:
        UserError: llama.cpp would derive from the new depth or indices another model than what is left; or the plan replaces
            tensors, or the file is one of several, or of the other byte order.
    """
    if plan.replaced:
        raise UserError(
            f"{source.identity.name}: a GGUF file keeps its tensors bit for bit, and the plan's compensation replaces some: "
            "plan without one (--compensate none), or write a folder"
        )
    return copy_gguf(source, plan.kept, file, json.dumps(without_local_paths(plan_to_dict(plan))), progress)


def copy_gguf(
    source: Source, kept: Sequence[int], file: Path, plan: str, progress: Progress = silent
) -> tuple[str, ...]:
    """Copies some layers of a GGUF file, and everything outside the layers.

    ``block_count`` and every array with one entry a layer are cut, which llama.cpp's own ``--prune-layers`` leaves as they
    are; what the file says of its size is left out. Which layers have a sliding window is written where it does not follow
    from the depth.

    Args:
        source: A GGUF source; ``source.config`` says what its layers are.
        kept: Original indices of the layers to copy, ascending.
        file: The file to write.
        plan: Text to put in under `PLAN_KEY`.
        progress: Reports written bytes.

    Returns:
        What a user of the file must know, one line each.

    Raises:
        UserError: See `export_gguf`.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(source.path)
    arch = _value(reader.fields["general.architecture"])
    _check(reader, arch, source, kept)
    writer = GGUFWriter(file, arch)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in _NOT_COPIED:
            _copy_field(writer, name, field, arch, source.num_layers, kept)
    key = f"{arch}.{WINDOWS}"
    if irregular := _irregular_windows(reader, arch, source.config, kept):
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, irregular, GGUFValueType.ARRAY, GGUFValueType.BOOL)
    writer.add_string(PLAN_KEY, plan)
    tensors = [(name, tensor) for tensor in reader.tensors if (name := _renamed(tensor.name, kept))]
    for name, tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress("Writing", sum(tensor.data.nbytes for _, tensor in tensors)) as advance:
            for _, tensor in tensors:
                writer.write_tensor_data(tensor.data)
                advance(tensor.data.nbytes)
    finally:
        writer.close()
    wrong = derived_wrongly(shortened_copy(source.config, source.adapter, kept), file)
    if wrong == ["layer_types"] and _is_array(GGUFReader(file), key):
        return (
            f"which layers have a sliding window is in {key}, one truth value a layer; transformers and old releases of "
            "llama.cpp derive it from the depth instead, and compute something else",
        )
    if wrong:
        raise UserError(
            f"{source.identity.name}: GGUF has no place for {wrong[0]} of what is left, which would be derived wrongly from the "
            "depth: write a folder"
        )
    return ()


def gguf_config(source: Source, plan: PrunePlan) -> PretrainedConfig:
    """The configuration of the shortened model, which transformers may derive wrongly from the file alone."""
    return shortened_copy(source.config, source.adapter, plan.kept)


def _check(reader: GGUFReader, arch: str, source: Source, kept: Sequence[int]) -> None:
    name, depth = source.identity.name, source.num_layers
    if reader.byte_order == "S":
        raise UserError(f"{name}: the file is of the other byte order (big endian), which is not written")
    if _number(reader, "split.count") > 1:
        raise UserError(
            f"{name}: one file of several; merge them first (`llama-gguf-split --merge FIRST.gguf ALL.gguf`)"
        )
    if len(kept) == depth:
        return
    if OTHER_MODEL_AT.get(arch) == depth:
        raise UserError(
            f"{name}: llama.cpp knows this model's scale of attention by its {depth} layers, and would take another "
            "for fewer: write a folder"
        )
    for key, alike in REGULAR.items():
        if (value := _number(reader, f"{arch}.{key}")) not in (0, *alike):
            raise UserError(
                f"{name}: by {arch}.{key} = {value} llama.cpp derives from a layer's index what it is, and removal changes the "
                "indices: write a folder"
            )


def _copy_field(writer: GGUFWriter, name: str, field: ReaderField, arch: str, depth: int, kept: Sequence[int]) -> None:
    from gguf import GGUFValueType

    value = _value(field)
    if isinstance(value, list) and not value:
        return  # the package writes no empty array
    if name == "general.alignment":
        writer.add_custom_alignment(value)
        return
    prefix = f"{arch}."
    if name.startswith(prefix):
        value = cut(name.removeprefix(prefix), value, depth, kept)
    kind = field.types[0]
    writer.add_key_value(name, value, kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)


def _irregular_windows(
    reader: GGUFReader, arch: str, config: PretrainedConfig, kept: Sequence[int]
) -> list[bool] | None:
    """Which kept layers have a sliding window, where llama.cpp would derive something else from the new depth."""
    field = reader.fields.get(f"{arch}.{WINDOWS}")
    given = PERIODS.get(arch) if field is None else _value(field)
    kinds = getattr(config, "layer_types", None)
    if not isinstance(given, int) or kinds is None or "sliding_attention" not in kinds:
        return None  # without windows, or an array that is cut like any other
    left = [kinds[layer] == "sliding_attention" for layer in kept]
    return left if left != windows(given, len(kept)) else None


def derived_wrongly(config: PretrainedConfig, file: Path) -> list[str]:
    """The configuration keys with an entry a layer that transformers reads otherwise from a GGUF file than they should be."""
    from transformers import AutoConfig

    wanted = config.to_dict()
    found = AutoConfig.from_pretrained(file.parent, trust_remote_code=False, gguf_file=file.name).to_dict()
    return sorted(key for key in PER_LAYER & set(wanted) if found.get(key) != wanted[key])


def _renamed(tensor: str, kept: Sequence[int]) -> str | None:
    """The name of a tensor in the shortened file; ``None`` when its layer is removed."""
    match = LAYER_TENSOR.match(tensor)
    if match is None:
        return tensor
    prefix, layer, rest = match.groups()
    return f"{prefix}{kept.index(int(layer))}{rest}" if int(layer) in kept else None


def _is_array(reader: GGUFReader, key: str) -> bool:
    field = reader.fields.get(key)
    return field is not None and isinstance(_value(field), list)


def _number(reader: GGUFReader, key: str) -> int:
    """The value of a key; 0 where there is none, and for an array, which is cut by layer."""
    field = reader.fields.get(key)
    value = 0 if field is None else _value(field)
    return value if isinstance(value, int) else 0


def _value(field: ReaderField) -> Any:
    """A field's value; texts in arrays as bytes, because not every token is valid text."""
    from gguf import GGUFValueType

    if field.types[0] == GGUFValueType.ARRAY:
        if field.types[-1] == GGUFValueType.STRING:
            return [bytes(field.parts[index]) for index in field.data]
        return [item for index in field.data for item in field.parts[index].tolist()]
    return field.contents()
