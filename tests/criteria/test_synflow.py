"""The criterion synflow against the linear network written out, in float64, and autograd with respect to every matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from calibration_sets import plain_set
from tiny_models import Tiny, tiny_model
from torch import Tensor

from sglp_llm.criteria import ScoreCriterion, make_criterion
from sglp_llm.engine import run_pass
from sglp_llm.models.loading import wrap_model

Matrices = dict[str, Tensor]


def llama_layer(states: Tensor, matrices: Matrices) -> Tensor:
    """Two heads of queries share one of values."""
    values = (matrices["self_attn.v_proj.weight"] @ states).view(2, 8).repeat_interleave(2, dim=0).flatten()
    states = states + matrices["self_attn.o_proj.weight"] @ values
    return states + matrices["mlp.down_proj.weight"] @ (matrices["mlp.up_proj.weight"] @ states)


def gpt2_layer(states: Tensor, matrices: Matrices) -> Tensor:
    """Matrices are ``[in, out]``, and the last third of the columns of the first makes the values."""
    values = (states @ matrices["attn.c_attn.weight"]).chunk(3)[-1]
    states = states + values @ matrices["attn.c_proj.weight"]
    return states + states @ matrices["mlp.c_fc.weight"] @ matrices["mlp.c_proj.weight"]


def neox_layer(states: Tensor, matrices: Matrices) -> Tensor:
    """Attention and MLP side by side; queries, keys and values lie together for each of the four heads."""
    values = (matrices["attention.query_key_value.weight"] @ states).view(4, 3, 8)[:, 2].flatten()
    attention = matrices["attention.dense.weight"] @ values
    mlp = matrices["mlp.dense_4h_to_h.weight"] @ (matrices["mlp.dense_h_to_4h.weight"] @ states)
    return states + attention + mlp


@pytest.mark.parametrize(
    ("tiny", "layer"),
    [(Tiny("llama", 0), llama_layer), (Tiny("gpt2", 0), gpt2_layer), (Tiny("gpt_neox", 0), neox_layer)],
    ids=["llama", "gpt2", "gpt_neox"],
)
def test_synflow_is_that_of_the_linear_network(tiny: Tiny, layer: Callable[[Tensor, Matrices], Tensor]) -> None:
    model = wrap_model(tiny_model(tiny))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # far from alike, so that wrong layers would be seen
        for each in model.layers:
            for parameter in each.parameters():
                parameter.mul_(0.5 * torch.rand((), generator=generator))
    absolute = [
        {
            name: each.detach().double().abs().requires_grad_()
            for name, each in layer.named_parameters()
            if each.ndim == 2
        }
        for layer in model.layers
    ]
    states = torch.ones(model.model.config.hidden_size, dtype=torch.float64)
    for matrices in absolute:
        states = layer(states, matrices)
    total = states.sum()
    total.backward()
    expected = [
        sum(float((each.detach() * each.grad).sum()) for each in matrices.values() if each.grad is not None)
        / total.item()
        for matrices in absolute
    ]
    criterion = make_criterion("synflow", model.num_layers)
    assert isinstance(criterion, ScoreCriterion)
    assert run_pass(model, plain_set(2), [criterion]) is None
    assert criterion.scores() == pytest.approx(expected, rel=1e-5)
    assert max(expected) > 1.2 * min(expected)
    assert all(not each._forward_hooks for each in model.model.modules())
