"""Plans that replace parameters, and the model with those parameters by plain torch."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch
from tiny_models import (
    REMOVED,
    Tiny,
)
from transformers import PreTrainedModel

from sglp_llm import PrunePlan
from sglp_llm.plan import plan_from_indices

CHANGED = (0, 2)
"""The layers before the cuts."""

COMPENSATION = {"method": "linear", "cuts": [{"start": 1, "stop": 2}, {"start": 3, "stop": 4}], "error": 0.25}
LLAMA = Tiny("llama", 0)
NORM = "model.layers.2.input_layernorm.weight"
"""A parameter of that model that such a plan replaces."""


def new_values(model: PreTrainedModel, path: str) -> dict[str, torch.Tensor]:
    """Other values, in float32, of every parameter of the layers before the cuts."""
    generator = torch.Generator().manual_seed(3)
    prefixes = tuple(f"{path}.{layer}." for layer in CHANGED)
    return {
        name: parameter.detach().float() + 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if name.startswith(prefixes)
    }


def overwritten(model: PreTrainedModel, values: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A copy of the model with these values in it."""
    other = deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    return other


def plan_with(tiny: Tiny, values: dict[str, torch.Tensor]) -> PrunePlan:
    plan = plan_from_indices(tiny.depth, REMOVED)
    return replace(plan, replaced=values, compensation=COMPENSATION)
