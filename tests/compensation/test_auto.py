"""The closed form that `auto` takes, by family."""

from __future__ import annotations

import pytest
import torch
from calibration_sets import sampled_set
from tiny_models import Tiny, every_tiny, tiny_model

from sglp_llm.compensation import check_compensation, get_method
from sglp_llm.errors import UserError
from sglp_llm.models.loading import wrap_model

SCALED = {"gemma2", "gemma3_text", "olmo2"}


def expected_name(tiny: Tiny) -> str:
    if tiny.family in SCALED or (tiny.family, tiny.number) == ("opt", 1):
        return "scale"
    return "linear" if tiny.family == "mixtral" else "refit"


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_the_closed_form_by_family(tiny: Tiny) -> None:
    model = wrap_model(tiny_model(tiny))
    check_compensation("auto", model.adapter, model.model.config, 8)
    calibration, name = sampled_set(model.model, 8), expected_name(tiny)
    found, expected = (get_method(each).run(model, calibration, (2, 3)) for each in ("auto", name))
    assert found.report == expected.report
    assert found.report["method"] == name
    for key, value in expected.replaced.items():
        assert torch.equal(found.replaced[key], value)


@pytest.mark.parametrize("family", ["mixtral", "olmo2"])
def test_refit_needs_a_linear_layer_at_the_end(family: str) -> None:
    model = wrap_model(tiny_model(Tiny(family, 0)))
    with pytest.raises(UserError, match="compensate refit does not work for this"):
        check_compensation("refit", model.adapter, model.model.config, 8)
