"""The criterion fisher against gates that hooks put on every channel, and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibration_sets import mean_loss, padded_set, plain_set
from tiny_models import Tiny, tiny_model

from sglp_llm.calibration import CalibrationSet
from sglp_llm.criteria import ScoreCriterion, make_criterion
from sglp_llm.engine import run_pass
from sglp_llm.models.loading import wrap_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("calibration", [plain_set(3), padded_set(3, "left")], ids=["plain", "padded"])
def test_fisher_is_half_the_squared_slope_of_every_channels_gate(family: str, calibration: CalibrationSet) -> None:
    model = wrap_model(tiny_model(Tiny(family, 0)))
    depth, width = model.num_layers, int(model.model.config.hidden_size)
    gates = torch.ones(depth, width, requires_grad=True)

    def hook_for(number: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            entering = args[0] if args else kwargs["hidden_states"]
            leaving = output[0] if isinstance(output, tuple) else output
            gated = entering + gates[number] * (leaving - entering)
            return (gated, *output[1:]) if isinstance(output, tuple) else gated

        return hook

    handles = [layer.register_forward_hook(hook_for(n), with_kwargs=True) for n, layer in enumerate(model.layers)]
    expected = torch.zeros(depth, dtype=torch.float64)
    for ids, mask in zip(calibration.input_ids, calibration.mask, strict=True):
        (slopes,) = torch.autograd.grad(mean_loss(model, ids, mask), gates)
        expected += slopes.double().square().sum(dim=1) / 2 / len(calibration.input_ids)
    for handle in handles:
        handle.remove()
    criterion = make_criterion("fisher", depth)
    assert isinstance(criterion, ScoreCriterion)
    run_pass(model, calibration, [criterion])
    assert criterion.scores() == pytest.approx(expected.tolist(), rel=1e-3)
