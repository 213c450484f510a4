"""Writes a shortened checkpoint: the only module that maps original layer indices to new ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sglp_llm.adapters import DecoderAdapter, text_config
from sglp_llm.adapters.structure.config_keys import OTHER_INDEX, OWN_INDEX, renumbered
from sglp_llm.checkpoint.shorten import shortened_copy, shortened_json, shortened_values
from sglp_llm.errors import UserError
from sglp_llm.models import Source
from sglp_llm.models.staying import staying_of
from sglp_llm.plan import plan_from_indices
from sglp_llm.plan.plans import check_replaced
from sglp_llm.progress import Progress, silent
from sglp_llm.records import ModelIdentity, PrunePlan
from sglp_llm.small_files import carried_files, copy_file, read_json
from sglp_llm.tensor_files.writer import NamedEntry, NewTensor, group_by_size, write_shards

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

# The other files of a checkpoint: tokenizer, processors, chat template, generation configuration, licence.
_CARRIED_OVER = (
    "*processor_config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "additional_chat_templates",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def export_from_files(
    source: Source, plan: PrunePlan, folder: Path, max_shard_size: int | None = None, progress: Progress = silent
) -> None:
    """Copies the kept tensors from the source's safetensors files, bit for bit, under their new names.

    A parameter that the plan replaces is written with the name, shape and dtype of the source's tensor. The model is not
    loaded; memory does not grow with its size. ``config.json`` is written last, so that an incomplete folder cannot be loaded.

    Args:
        source: A safetensors source.
        plan: A plan that fits the source, see `check_plan`.
        folder: An existing, empty folder.
        max_shard_size: Largest shard in bytes; ``None`` keeps the source's sharding.
        progress: Reports written bytes.

    Raises:
        UserError: A replaced tensor matches no tensor of the source.
    """
    assert source.index is not None
    new = _new_tensors(source, plan)
    shards: list[list[NamedEntry]] = [[] for _ in source.index.files]
    shard_of = dict(zip(source.index.files, shards, strict=True))
    for entry in source.index.tensors.values():
        if name := renamed(entry.name, source.adapter, plan.kept):
            shard_of[entry.file].append((name, new.get(entry.name, entry)))
    if max_shard_size is not None:
        shards = group_by_size([tensor for shard in shards for tensor in shard], max_shard_size)
    shards = [shard for shard in shards if shard]
    with progress("Writing", sum(entry.nbytes for shard in shards for _, entry in shard)) as advance:
        write_shards(folder, shards, source.index.metadata, advance)
    carry_over(source.path, folder)
    config = json.dumps(shortened_json(source, plan.kept), indent=2)
    (folder / "config.json").write_text(f"{config}\n", encoding="utf-8")


def _new_tensors(source: Source, plan: PrunePlan) -> dict[str, NewTensor]:
    """The tensors that are written instead of the source's, by the source's names."""
    special = source.adapter.exceptions.fused if plan.removed else {}
    if not plan.replaced and not special:
        return {}
    # They import torch, which a plain export does without.
    from sglp_llm.checkpoint.replaced import in_files, without_blocks
    from sglp_llm.tensor_files.tensors import new_tensor

    tensors = in_files(source, plan.replaced) if plan.replaced else {}
    return {name: new_tensor(tensor) for name, tensor in {**tensors, **without_blocks(source, plan.kept)}.items()}


def export_from_model(model: PreTrainedModel, folder: Path, max_shard_size: int | None = None) -> None:
    """Saves a model that `drop_layers` has shortened, through its own ``save_pretrained``.

    Args:
        model: The shortened model.
        folder: An existing, empty folder.
        max_shard_size: Largest shard in bytes; ``None`` leaves it to transformers.
    """
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    try:
        model.save_pretrained(folder, **options)
    except ValueError:  # transformers before 5.21 saves no generation settings that contradict each other
        own = model.generation_config
        model.generation_config = type(own)()
        try:
            model.save_pretrained(folder, **options)
        finally:
            model.generation_config = own


def carry_over(source: Path, folder: Path) -> None:
    """Copies tokenizer, chat template, generation configuration and licence files as they are.

    Raises:
        UserError: See `check_carried`.
    """
    for file in carried_files(source, _CARRIED_OVER):
        copy_file(file, folder)


def check_carried(source: Path) -> None:
    """Refuses, before any work is done, files that `carry_over` would not copy, or with which no export would load.

    Raises:
        UserError: One is no regular file of the checkpoint's own, or transformers cannot read the generation configuration.
    """
    from transformers import GenerationConfig

    carried_files(source, _CARRIED_OVER)
    file = source / "generation_config.json"
    if not file.exists():
        return
    if not isinstance(read_json(file, "generation configuration"), dict):
        raise UserError(f"{file}: not a generation configuration: expected a JSON object")
    try:
        GenerationConfig.from_pretrained(source)
    except Exception as error:  # whatever its checks raise
        raise UserError(f"{file}: transformers cannot read it ({' '.join(str(error).split())[:200]})") from None


def check_plan(
    plan: PrunePlan,
    model: ModelIdentity,
    num_layers: int,
    layer_sizes: Callable[[], tuple[int, ...]],
    stored: bool = True,
    quantised: bool = False,
) -> None:
    """Checks that a plan is for this model, or for a sibling: fine-tuned, quantised, or otherwise of the same shape.

    Args:
        plan: The plan.
        model: The model it is to be used on.
        num_layers: Its number of decoder layers.
        layer_sizes: Its number of parameters of each decoder layer; called where the plan is not for the same model.
        stored: Whether it is a checkpoint. Of a live model only the family is compared: its fingerprint may differ from the
            plan's, since tensors have other names and dtypes in memory than in files.
        quantised: Whether it is. A plan that does not say the sizes of the layers is then for it too.

    Raises:
        UserError: The depth, the family or the sizes of layers differ, or the plan replaces weights of a sibling.
    """
    check_depth(plan, num_layers, model.name)
    if plan.source is None:
        return
    is_family = plan.source.model_type == model.model_type
    if is_family and (not stored or plan.source.fingerprint == model.fingerprint):
        return
    sizes = None if plan.footprint is None else plan.footprint.layers
    if not is_family or (sizes != layer_sizes() if sizes else not quantised):
        made_for, given = (
            f"{each.name} ({each.model_type}, {each.fingerprint[:23]}...)" for each in (plan.source, model)
        )
        raise UserError(f"the plan was made for another model: {made_for}, not {given}")
    if plan.replaced and not quantised:
        raise UserError(
            f"the plan replaces weights, fitted to those of {plan.source.name}, and {model.name} has others: make the plan for "
            "this model, or one with --compensate none"
        )


def check_depth(plan: PrunePlan, num_layers: int, name: str) -> None:
    """Checks that a plan fits a model of this depth, and replaces nothing that it removes.

    Raises:
        UserError: It does not.
    """
    if plan.num_layers != num_layers:
        raise UserError(f"the plan is for a model of {plan.num_layers} decoder layers, and {name} has {num_layers}")
    check_replaced(plan, "the plan")


def renamed(tensor: str, adapter: DecoderAdapter, kept: Sequence[int]) -> str | None:
    """The name of a stored tensor in the shortened checkpoint; ``None`` when its layer is removed."""
    match = adapter.layer_key_pattern.match(tensor)
    if match is None:
        return tensor
    prefix, layer, rest = match.groups()
    return f"{prefix}{kept.index(int(layer))}{rest}" if int(layer) in kept else None


def drop_layers(model: PreTrainedModel, plan_or_indices: PrunePlan | Iterable[int]) -> PreTrainedModel:
    """Shortens a live transformers model in place.

    Afterwards the model runs, generates with its KV cache, trains and saves (``save_pretrained``) like any model of that
    depth. The modules of kept layers stay the same objects with the same weights, except for weights that the plan replaces.

    Args:
        model: A causal language model of a known family.
        plan_or_indices: A plan, or the 0-based indices of the layers to REMOVE.

    Returns:
        The same model.

    Raises:
        UserError: The family is unknown, the plan or the indices do not fit the model's depth, or the plan replaces a parameter
            that is not in memory.
    """
    from torch import nn

    from sglp_llm.checkpoint.replaced import checked_parameters
    from sglp_llm.models.loading import wrap_model

    wrapped = wrap_model(model)
    adapter, plan = wrapped.adapter, plan_or_indices
    if not isinstance(plan, PrunePlan):
        plan = plan_from_indices(wrapped.num_layers, plan)
    check_depth(plan, wrapped.num_layers, "the model")
    if adapter.is_derived:
        _prove_live(model, adapter, plan.kept)
    parameters = checked_parameters(model, plan.replaced)
    if offloaded := [name for name, parameter in parameters.items() if parameter.is_meta]:
        raise UserError(
            f"accelerate keeps {offloaded[0]!r} out of memory, and the plan replaces it: load the whole model"
        )
    for name, parameter in parameters.items():
        parameter.data = plan.replaced[name].to(parameter.device, parameter.dtype, copy=True)
    values = shortened_values(model.config, adapter, plan.kept)
    layers = nn.ModuleList(wrapped.layers[layer] for layer in plan.kept)
    _renumber(layers, plan.kept)
    model.set_submodule(adapter.layers, layers)
    for key, value in values.items():
        setattr(wrapped.config, key, value)
    return model


def _prove_live(model: PreTrainedModel, adapter: DecoderAdapter, kept: Sequence[int]) -> None:
    from sglp_llm.adapters.structure.proof import prove

    name = model.config.name_or_path or type(model).__name__
    if adapter.exceptions.fused:
        raise UserError(
            f"{name}: tensors outside the layers hold a part for each layer, and are shortened in files alone: "
            "save the model and give the folder"
        )
    depth = int(getattr(text_config(model.config), adapter.depth_key))
    if broken := staying_of(model.config, adapter, depth).broken_by(set(range(depth)) - set(kept)):
        raise UserError(f"{name}: {broken}")
    prove(model.config, shortened_copy(model.config, adapter, kept), adapter, kept, name)


@contextmanager
def shortened(
    model: PreTrainedModel, removed: Iterable[int], replaced: Mapping[str, torch.Tensor] | None = None
) -> Iterator[PreTrainedModel]:
    """Inside the block the live model is shortened as by `drop_layers`; afterwards it is restored.

    Args:
        model: A causal language model of a known family.
        removed: 0-based indices of the layers to remove; when empty, the model is not changed.
        replaced: New values of parameters of kept layers, as in a plan.
    """
    from sglp_llm.engine.modes import replaced_weights
    from sglp_llm.models.loading import wrap_model

    indices = list(removed)
    if not indices:
        assert not replaced
        yield model
        return
    wrapped = wrap_model(model)
    layers = wrapped.layers
    numbers = [(module, key, getattr(module, key)) for module in layers.modules() for key in _index_keys(module)]
    changed = shortened_values(model.config, wrapped.adapter, [0])
    before = {key: getattr(wrapped.config, key) for key in changed}
    with replaced_weights(wrapped, replaced or {}):
        drop_layers(model, indices)
        try:
            yield model
        finally:
            model.set_submodule(wrapped.adapter.layers, layers)
            for module, key, value in numbers:
                setattr(module, key, value)
            for key, value in before.items():
                setattr(wrapped.config, key, value)


def _renumber(layers: Iterable[nn.Module], kept: Sequence[int]) -> None:
    """Sets every attribute that holds the index of a layer: the slot of the KV cache, or the layer whose keys are shared."""
    for old, layer in zip(kept, layers, strict=True):
        for module in layer.modules():
            for key in _index_keys(module):
                setattr(module, key, renumbered(key, getattr(module, key), old, kept))


def _index_keys(module: nn.Module) -> list[str]:
    """The attributes of a module that hold the index of a decoder layer."""
    return [key for key in (*OWN_INDEX, *OTHER_INDEX) if isinstance(vars(module).get(key), int)]
