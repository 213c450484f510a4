"""Which parameters are trained: all, those around the cuts, or low-rank adapters. The only room for the library `peft`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sglp_llm.adapters import is_wrapper
from sglp_llm.errors import UserError
from sglp_llm.models.loading import DecoderModel
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.records import PrunePlan

_DROPPED_SHARES = ("layerdrop", "dropout", "attention_dropout", "activation_dropout")
"""Attributes of transformers' modules that are probabilities of leaving something out while training."""


@dataclass(frozen=True)
class Trained:
    """A model of which some parameters take gradients.

    Attributes:
        model: What is trained: the model itself, or peft's wrapper around it. Trained parameters are float32.
        parameters: Number of trained parameters.
        changed: Names of the parameters of the plain model that training changes.
        front: The decoder layers in front of all that is trained: what leaves them does not change.
    """

    model: nn.Module
    parameters: int
    changed: frozenset[str]
    front: tuple[nn.Module, ...] = ()

    @property
    def plain(self) -> PreTrainedModel:
        """The transformers model that computes, adapters in its place and not yet merged."""
        model: Any = self.model
        plain: PreTrainedModel = model.get_base_model() if hasattr(model, "merge_and_unload") else model
        return plain

    def save_adapter(self, folder: Path) -> None:
        """Writes peft's adapter; only with LoRA, and before `merged`."""
        save: Any = self.model.save_pretrained
        save(folder)

    def merged(self) -> PreTrainedModel:
        """The model with everything that was learned in its own weights; the adapters are gone afterwards."""
        if not hasattr(self.model, "merge_and_unload"):
            assert isinstance(self.model, PreTrainedModel)
            return self.model
        merge: Any = self.model.merge_and_unload
        merged: PreTrainedModel = merge()
        return merged


def seams_of(plan: PrunePlan) -> tuple[int, ...]:
    """Where layers are missing: for each cut the index, in the shortened model, of the first layer behind it."""
    kept = plan.kept
    bounds = [(-1, kept[0]), *pairwise(kept), (kept[-1], plan.num_layers)]
    return tuple(index for index, (before, after) in enumerate(bounds) if after - before > 1)


def layers_around(seams: Sequence[int], num_layers: int, recipe: HealingRecipe) -> set[int]:
    """The decoder layers next to the cuts of a shortened model; there are fewer at the ends.

    Args:
        seams: See `seams_of`.
        num_layers: Depth of the shortened model.
        recipe: For how many, and on which side.
    """
    before = 0 if recipe.seam_side == "behind" else recipe.seam_layers
    behind = 0 if recipe.seam_side == "before" else recipe.seam_layers
    return {layer for seam in seams for layer in range(seam - before, seam + behind) if 0 <= layer < num_layers}


def check_peft(recipe: HealingRecipe) -> None:
    """Refuses, before any work is done, LoRA without peft.

    Raises:
        UserError: It is not installed.
    """
    if recipe.train == "lora" and find_spec("peft") is None:
        raise UserError("train lora needs peft: pip install 'sglp-llm[heal]'")


def make_trainable(decoder: DecoderModel, recipe: HealingRecipe, plan: PrunePlan | None) -> Trained:
    """Lets the recipe's parameters take gradients, in float32, and no others.

    Of the others only the weights of linears may stay narrower: what the layers hand on is float32 in any case.

    Args:
        decoder: The shortened model, in memory.
        recipe: For ``train`` and what belongs to it.
        plan: What was removed; needed for ``seam`` and ``partial``.

    Raises:
        UserError: The layers around the cuts are to be trained, and there is no plan, or it is another model's.
    """
    assert recipe.train != "auto", "see fitting_train"
    model = decoder.model
    model.requires_grad_(False)
    _drop_nothing(model)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    linears = {id(each.weight) for each in model.modules() if isinstance(each, nn.Linear | Conv1D)}
    for parameter in model.parameters():
        if id(parameter) not in linears or parameter is model.get_input_embeddings().weight:
            parameter.data = parameter.data.float()
    if recipe.train == "lora":
        return _with_adapters(decoder, recipe)
    count, changed = 0, set[str]()
    for name, parameter in _wanted(decoder, recipe, plan):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
        count += parameter.numel()
        changed.add(name)
    return Trained(model, count, frozenset(changed), _front(decoder))


def _front(decoder: DecoderModel) -> tuple[nn.Module, ...]:
    """None where anything outside the layers is trained (a tied head is the embedding, too), or layers may hand on more."""
    trained = {id(parameter) for parameter in decoder.model.parameters() if parameter.requires_grad}
    inside = [{id(parameter) for parameter in layer.parameters()} for layer in decoder.layers]
    if decoder.adapter.is_derived or not trained <= set().union(*inside):
        return ()
    first = next(index for index, own in enumerate(inside) if own & trained)
    return tuple(decoder.layers[index] for index in range(first))


def count_trained(decoder: DecoderModel, recipe: HealingRecipe, plan: PrunePlan | None) -> int:
    """How many parameters `make_trainable` would train; it changes nothing, and raises the same errors."""
    if recipe.train == "lora":
        return sum(recipe.lora_rank * sum(each.weight.shape) for _, each in _linears(decoder))
    return sum(parameter.numel() for _, parameter in _wanted(decoder, recipe, plan))


def _wanted(decoder: DecoderModel, recipe: HealingRecipe, plan: PrunePlan | None) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own parameters that are trained, by name."""
    model = decoder.model
    chosen: set[int] = set()
    if recipe.train in ("seam", "partial"):
        if plan is None:
            raise UserError(
                f"train {recipe.train}: there is no sglp_plan.json in the folder that says where the cuts are"
            )
        chosen = layers_around(seams_of(plan), decoder.num_layers, recipe)
        if not chosen:
            raise UserError(f"seam_side {recipe.seam_side}: there are no layers on that side of the cut")
    if recipe.train == "partial":
        chosen |= set(range(max(0, decoder.num_layers - recipe.last_layers), decoder.num_layers))
    inside = {id(parameter) for layer in decoder.layers for parameter in layer.parameters()}
    embedding = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    head = model.get_output_embeddings()
    tied = set() if head is None else {id(parameter) for parameter in head.parameters()}
    wanted = {id(parameter) for layer in chosen for parameter in decoder.layers[layer].parameters()}
    for name, parameter in model.named_parameters():
        if not _reads_text(name, decoder, id(parameter) in tied):
            continue
        behind = id(parameter) not in inside and (id(parameter) not in embedding or id(parameter) in tied)
        if recipe.train == "full" or id(parameter) in wanted or (recipe.train == "partial" and behind):
            yield name, parameter


def _reads_text(name: str, decoder: DecoderModel, is_head: bool) -> bool:
    """Whether a parameter belongs to the decoder; in a model of images and text the vision tower and its projector do not."""
    path = decoder.adapter.layers.rpartition(".")[0]
    return is_head or not is_wrapper(decoder.model.config) or name.startswith(f"{path}.")


def _linears(decoder: DecoderModel) -> list[tuple[str, nn.Linear | Conv1D]]:
    """The linears of all decoder layers, by their names in the model."""
    names = {id(module): name for name, module in decoder.model.named_modules()}
    return [
        (names[id(module)], module)
        for layer in decoder.layers
        for module in layer.modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]


def _drop_nothing(model: nn.Module) -> None:
    """Turns dropout and LayerDrop off: text is seen about once, and no step may depend on how it is shared by processes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPPED_SHARES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _with_adapters(decoder: DecoderModel, recipe: HealingRecipe) -> Trained:
    """LoRA (Hu et al., arXiv 2106.09685) on every linear of every decoder layer."""
    check_peft(recipe)
    from peft import LoraConfig, get_peft_model

    targets = [name for name, _ in _linears(decoder)]
    transposed = any(isinstance(module, Conv1D) for module in decoder.model.modules())
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        target_modules=targets,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = get_peft_model(decoder.model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    changed = frozenset(f"{name}.weight" for name in targets)
    return Trained(model, sum(parameter.numel() for parameter in trained), changed)
