"""Numbers of parameters of a model, by part: the basis of the memory prediction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from sglp_llm.adapters import adapter_of, text_config
from sglp_llm.compensation.repair.branch import inputs_of
from sglp_llm.compensation.repair.refine import refinable_names


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; tied ones count once.

    Attributes:
        total: All of them.
        layer: Those of the largest decoder layer.
        embedding: Those of the input embedding; 0 when the head is tied to it.
        outside: Those outside the decoder layers, the input embedding included.
        matrices: Those of all layers' parameters of two or more dimensions.
        layer_matrices: The same of the largest layer.
        largest: Those of a layer's largest parameter.
        refinable: Those that a compensation with gradients can change, counted over all layers.
        mlp_width: Not a number of parameters: the width of the MLP's hidden layer, or of the hidden states where the MLP does not
            end in a linear layer.
    """

    total: int
    layer: int
    embedding: int
    outside: int
    matrices: int
    layer_matrices: int
    largest: int
    refinable: int
    mlp_width: int


def count_parameters(model: PreTrainedModel, layers: nn.ModuleList) -> ParameterCounts:
    """Counts by shape, so fake tensors suffice.

    Args:
        model: The ``...ForCausalLM``.
        layers: Its decoder layers.
    """
    adapter, config = adapter_of(model.config), text_config(model.config)
    width, branch = config.hidden_size, adapter.mlp_branch(config)
    ends_otherwise = branch.is_norm or branch.is_stacked or not branch.last
    total = _numel(model)
    matrices = [sum(weight.numel() for weight in layer.parameters() if weight.ndim > 1) for layer in layers]
    head, lookup = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is lookup.weight
    return ParameterCounts(
        total=total,
        layer=max(_numel(layer) for layer in layers),
        embedding=0 if tied else _numel(lookup),
        outside=total - sum(_numel(layer) for layer in layers),
        matrices=sum(matrices),
        layer_matrices=max(matrices),
        largest=max(weight.numel() for weight in layers.parameters()),
        refinable=sum(
            layer.get_parameter(name).numel() for layer in layers for name in refinable_names(layer, adapter, width)
        ),
        mlp_width=width if ends_otherwise else max(inputs_of(layer, branch) for layer in layers),
    )


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
