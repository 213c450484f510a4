"""Types only some of whose layers can go: the choice knows it before the analysis, or the analysis is not begun."""

from __future__ import annotations

import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from calibration_sets import plain_set
from helpers import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

from sglp_llm import analyze, drop_layers, prune, replan
from sglp_llm.adapters.structure import derive
from sglp_llm.adapters.structure.empty import without_weights
from sglp_llm.adapters.structure.exceptions import EXCEPTIONS
from sglp_llm.errors import UserError
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import plan_from_indices

sys.path.append(str(ROOT / "tools"))
from probe_families import pruned, random_model
from tiny_types import tiny_config

NOT_READ = "text:/no/such/file"  # the settings are refused before a calibration is looked for


def two_periods(**changes: Any) -> Any:
    """Jamba with every second layer sparse, and attention in every fourth."""
    settings = {**tiny_config("jamba").to_dict(), "attn_layer_period": 4, "attn_layer_offset": 2, **changes}
    return AutoConfig.for_model("jamba", **{key: value for key, value in settings.items() if key != "model_type"})


def keeps_the_pattern(removed: tuple[int, ...]) -> bool:
    kept = [layer for layer in range(8) if layer not in removed]
    return all((old % 4 == 2, old % 2) == (new % 4 == 2, new % 2) for new, old in enumerate(kept))


@pytest.mark.parametrize(("criterion", "drop"), [("random", 4), ("angular", 4), ("bi", 2)])
def test_what_is_chosen_keeps_a_pattern_by_index(criterion: str, drop: int) -> None:
    plan = analyze(
        random_model(two_periods()), criterion=criterion, drop=drop, calibration=plain_set(2, 8), engine="resident"
    ).plan
    assert len(plan.removed) == drop
    assert keeps_the_pattern(plan.removed)
    if criterion != "angular":
        again = replan(plan, drop=5).removed
        assert len(again) == 5
        assert keeps_the_pattern(again)


def test_layers_in_a_row_go_by_a_plan(tmp_path: Path) -> None:
    model = random_model(two_periods())
    model.save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    out = tmp_path / "out"
    assert (
        pruned(tmp_path / "source", out, model, False, plan=plan_from_indices(8, [1, 2, 3, 4]), verify=False) == "exact"
    )
    with pytest.raises(UserError, match=r"layer 2 cannot become layer 0: .* 4 layers in a row can go, and last ones"):
        prune(tmp_path / "source", tmp_path / "other", plan=plan_from_indices(8, [0, 1]))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("criterion", ["slp", "lorp", "sleb", "search"])
def test_one_layer_after_the_other_is_refused_before_the_analysis(criterion: str) -> None:
    with pytest.raises(UserError, match=r"removes one layer after the other, and .* or angular, or .* --plan"):
        analyze(random_model(two_periods()), criterion=criterion, drop=4, calibration=NOT_READ)


def test_no_layers_in_a_row_is_refused_before_the_analysis() -> None:
    with pytest.raises(UserError, match="criterion angular removes 2 contiguous layers, and no 2 can go: layer 1 must"):
        analyze(random_model(tiny_config("zamba2")), criterion="angular", drop=2, calibration=NOT_READ)


def test_a_pattern_that_is_not_known_is_refused_before_the_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: each for name, each in EXCEPTIONS.items() if name != "jamba"}
    monkeypatch.setattr(derive, "EXCEPTIONS", MappingProxyType(known))
    with pytest.raises(UserError, match=r"cannot become layer .* not known before it is tried: .* with --plan"):
        analyze(random_model(two_periods(vocab_size=321)), criterion="bi", drop=2, calibration=NOT_READ)


def test_layers_that_share_weights_stay_and_are_counted_once(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    random_model(tiny_config("zamba2")).save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    assert pruned(source, out, model, False, criterion="bi", drop=2, engine="resident", verify=False) == "exact"
    footprint = OpenedModel(out).footprint()
    assert footprint.params_without(()) == AutoModelForCausalLM.from_pretrained(out).num_parameters()
    with pytest.raises(UserError, match="layer 3 must stay: it shares weights with the other hybrid layers"):
        prune(source, tmp_path / "other", plan=plan_from_indices(8, [3]))


def test_all_that_read_a_layers_keys_may_go(tmp_path: Path) -> None:
    """Afterwards transformers lets another layer hand its keys on, which nobody reads."""
    source = tmp_path / "source"
    random_model(tiny_config("gemma4_text")).save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    assert pruned(source, tmp_path / "out", model, True, plan=plan_from_indices(8, [4, 6])) == "exact"


def test_a_live_model_keeps_what_must_stay() -> None:
    settings = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    data = {key: value for key, value in tiny_config("gemma4_text").to_dict().items() if key != "per_layer_config"}
    model = random_model(AutoConfig.for_model(**{**data, **settings}))
    with pytest.raises(UserError, match="layer 4 must stay as long as layer 6 does"):
        drop_layers(model, [4])
    assert len(model.model.layers) == 8


def test_a_model_without_weights_takes_no_memory() -> None:
    """Its stacked experts alone are larger than any address space that a system gives."""
    settings = {"hidden_size": 2**16, "moe_intermediate_size": 2**19, "n_routed_experts": 256, "num_hidden_layers": 2}
    config = AutoConfig.for_model("deepseek_v3", **settings, first_k_dense_replace=1)
    with without_weights():
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() > 2**44
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers() if buffer.is_floating_point() and buffer.ndim == 1)
    assert torch.equal(model.model.rotary_emb.inv_freq, derive.empty_model(config).model.rotary_emb.inv_freq)
