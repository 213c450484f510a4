"""A plan's replaced tensors in the names, layouts and dtypes of the source's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from sglp_llm.adapters import auto_class
from sglp_llm.adapters.structure.empty import without_weights
from sglp_llm.errors import UserError
from sglp_llm.models import Source
from sglp_llm.tensor_files import CheckpointIndex
from sglp_llm.tensor_files.mapped import DTYPES, mapped_tensor


def checked_parameters(model: nn.Module, replaced: Mapping[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """The parameters that the tensors are to replace, by the same names.

    Raises:
        UserError: The model has no parameter of a name, or it has another shape.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in replaced.items():
        if name not in parameters:
            raise UserError(f"the plan replaces {name!r}, and the model has no such parameter")
        if tensor.shape != parameters[name].shape:
            raise UserError(
                f"the plan replaces {name!r} by a tensor of the shape {list(tensor.shape)}; "
                f"the model's has {list(parameters[name].shape)}"
            )
    return {name: parameters[name] for name in replaced}


def in_files(source: Source, replaced: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as the source stores them: by its names, in its layout and dtypes.

    Raises:
        UserError: One matches no parameter of the model, or no tensor of the files.
    """
    return {stored: piece for pieces in _pieces(source, replaced).values() for stored, piece in pieces.items()}


def without_blocks(source: Source, kept: Sequence[int]) -> dict[str, torch.Tensor]:
    """Tensors outside the layers that hold one block a layer, with the blocks of the kept layers, by the names in the files.

    Args:
        source: A safetensors source.
        kept: Original indices of the kept layers, ascending.

    Raises:
        UserError: A tensor's dimension is no multiple of the number of layers.
    """
    assert source.index is not None
    cut = {}
    for name, dimension in source.adapter.exceptions.fused.items():
        if (stored := _stored_name(name, source)) is None:
            continue  # a model without them
        tensor = mapped_tensor(source.index.tensors[stored])
        if tensor.shape[dimension] % source.num_layers:
            raise UserError(
                f"{source.identity.name}: dimension {dimension} of tensor {stored!r} is {tensor.shape[dimension]}, which is no "
                f"multiple of the {source.num_layers} decoder layers"
            )
        blocks = tensor.chunk(source.num_layers, dimension)
        cut[stored] = torch.cat([blocks[layer] for layer in kept], dimension)
    return cut


def as_stored(
    config: PretrainedConfig, source: Source | None, replaced: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors rounded to the dtypes in which an export stores them, by the same names.

    Args:
        config: The model's configuration.
        source: The checkpoint; where it is not safetensors, or there is none, an export saves the loaded model, and nothing is
            rounded here.
        replaced: New values by parameter name.

    Raises:
        UserError: One matches no parameter of the model, or no tensor of the files; or it is not finite, perhaps after rounding.
    """
    if not replaced:
        return {}
    if source is None or source.index is None:
        checked_parameters(_empty_model(config), replaced)
        rounded = dict(replaced)
    else:
        pieces = _pieces(source, replaced)
        rounded = {name: tensor.to(next(iter(pieces[name].values())).dtype) for name, tensor in replaced.items()}
    for name, tensor in rounded.items():
        if not tensor.isfinite().all():
            raise UserError(f"the plan replaces {name!r} by numbers that are not finite in {str(tensor.dtype)[6:]}")
    return rounded


def _pieces(source: Source, replaced: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The stored tensors of each parameter, by the parameter's name; several for a stack of experts' matrices."""
    assert source.index is not None
    model = _empty_model(source.config)
    checked_parameters(model, replaced)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in replaced.items():
        # Some checkpoints store a tensor in the model's own layout, although transformers converts those of others.
        for pieces in (revert_weight_conversion(model, {name: tensor}), {name: tensor}):
            stored = {each: _stored_name(each, source) for each in pieces}
            if all(stored.values()):
                found[name] = {
                    known: _cast(piece, known, source.index)
                    for each, piece in pieces.items()
                    if (known := stored[each]) is not None
                }
                break
        else:
            raise UserError(f"{source.identity.name}: the plan replaces {name!r}, and no stored tensor belongs to it")
    return found


def _stored_name(name: str, source: Source) -> str | None:
    """The name in the files, which lack the first component of the path where the bare decoder was saved."""
    assert source.index is not None
    return next((each for each in (name, name.partition(".")[2]) if each in source.index.tensors), None)


def _cast(tensor: torch.Tensor, stored: str, index: CheckpointIndex) -> torch.Tensor:
    entry = index.tensors[stored]
    if tuple(tensor.shape) != entry.shape:
        raise UserError(
            f"{entry.file}: tensor {stored!r} has the shape {list(entry.shape)}, and {list(tensor.shape)} by the configuration"
        )
    return tensor.to(DTYPES[entry.dtype])


def _empty_model(config: PretrainedConfig) -> nn.Module:
    with without_weights():
        model: nn.Module = auto_class(config).from_config(config)
    return model
