"""When trials are computed in bfloat16 although the model is not."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Tiny, tiny_model

from sglp_llm.analysis import observing
from sglp_llm.models.loading import wrap_model
from sglp_llm.plan import Recipe


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["model", "auto"])
def test_only_of_a_float32_model_where_it_is_faster(
    fast: bool, dtype: torch.dtype, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observing, "has_fast_bfloat16", lambda: fast)
    model = wrap_model(tiny_model(Tiny("llama", 0)).to(dtype))
    found = observing.trials_in_bfloat16(Recipe().with_changes(trial_dtype=wanted), model)
    assert found == (fast and wanted == "auto" and dtype == torch.float32)
