"""The footprint against transformers: parameters of the shortened model, and the cache that it really fills."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from model_bytes import cache_after, cache_bytes, total_bytes, weight_bytes
from tiny_models import REMOVED, Tiny, every_tiny, load_plain, save_tiny, tiny_model

from sglp_llm import drop_layers, prune
from sglp_llm.models.footprint import footprint_of
from sglp_llm.models.loading import wrap_model
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import plan_from_indices
from sglp_llm.records import Footprint


@cache
def whole(tiny: Tiny) -> Footprint:
    model = tiny_model(tiny)
    return footprint_of(wrap_model(model), model.dtype)


@pytest.mark.parametrize("removed", [(), REMOVED], ids=["whole", "shortened"])
@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_bytes_are_those_of_the_shortened_model(tiny: Tiny, removed: tuple[int, ...]) -> None:
    model = tiny_model(tiny)
    if removed:
        drop_layers(model, removed)
    assert whole(tiny).params_without(removed) == model.num_parameters()
    for context in (1, 5, 8, 40):  # the tiny sliding windows are 8
        cached = cache_bytes(cache_after(model, context))
        assert whole(tiny).cache_bytes_without(removed, context) == cached
        assert whole(tiny).bytes_without(removed, context) == cached + weight_bytes(model)


def test_the_dtype_is_that_of_the_exported_checkpoint(tmp_path: Path) -> None:
    tiny = Tiny("qwen2", 0)
    source = save_tiny(tiny_model(tiny).to(torch.bfloat16), tmp_path / "source")
    opened = OpenedModel(source, dtype="float32")
    assert opened.load().model.dtype == torch.float32
    assert opened.footprint().itemsize == 2
    prune(source, tmp_path / "out", plan=plan_from_indices(tiny.depth, REMOVED), verify=False)
    plain = load_plain(tmp_path / "out")
    assert opened.footprint().bytes_without(REMOVED, 40) == total_bytes(plain, 40)
