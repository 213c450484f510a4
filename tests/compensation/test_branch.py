"""Folding into the weights behind a branch."""

from __future__ import annotations

import pytest
import torch
from calibration_sets import plain_set
from layer_states import states_around
from tiny_models import Tiny, every_tiny, tiny_model

from sglp_llm.adapters import Branch
from sglp_llm.compensation.repair.branch import branch_outputs, folded
from sglp_llm.compensation.repair.cuts import cuts_of
from sglp_llm.engine.modes import replaced_weights
from sglp_llm.models.loading import wrap_model
from sglp_llm.records import Segment

EVERY_TINY = pytest.mark.parametrize("tiny", every_tiny(), ids=str)


@EVERY_TINY
def test_folding_multiplies_what_the_branch_adds_and_nothing_else(tiny: Tiny) -> None:
    model, calibration = wrap_model(tiny_model(tiny)), plain_set(1)
    branch, layer, path = model.adapter.mlp_branch(model.model.config), model.layers[2], f"{model.adapter.layers}.2."
    generator = torch.Generator().manual_seed(5)
    with branch_outputs(layer, branch) as seen:
        leaving = states_around(model, calibration)[0][2][1].double()
        given = seen[0].reshape(leaving.shape).double()
    width = leaving.shape[1]
    factors = [torch.zeros(width, dtype=torch.float64), torch.randn(width, generator=generator, dtype=torch.float64)]
    if not branch.is_norm:
        factors.append(torch.randn(width, width, generator=generator, dtype=torch.float64))
    for factor in factors:
        tensors = {path + name: value for name, value in folded(layer, branch, factor).items()}
        with replaced_weights(model, tensors):
            found = states_around(model, calibration)[0][2][1].double()
        moved = given @ factor if factor.ndim > 1 else given * factor
        torch.testing.assert_close(found, leaving - given + moved, rtol=1e-4, atol=1e-4)


@EVERY_TINY
def test_the_last_linears_of_both_blocks_are_where_the_adapter_says(tiny: Tiny) -> None:
    model = wrap_model(tiny_model(tiny))
    width = model.model.config.hidden_size
    for path in (model.adapter.mlp_out, model.adapter.attention_out):
        values = folded(model.layers[0], Branch(model.adapter.mlp, path), torch.eye(width, dtype=torch.float64))
        assert values
        for name, value in values.items():
            torch.testing.assert_close(value.float(), model.layers[0].get_parameter(name))


def test_cuts_are_maximal_runs() -> None:
    assert cuts_of((5, 0, 2, 3)) == [Segment(0, 1), Segment(2, 4), Segment(5, 6)]
    assert cuts_of(()) == []
