"""Model types without a file of their own, pruned and compared with plain transformers by `tools/probe_families.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from calibration_sets import plain_set
from helpers import ROOT

from sglp_llm import prune
from sglp_llm.adapters import adapter_names
from sglp_llm.errors import UserError

sys.path.append(str(ROOT / "tools"))
from probe_families import in_a_process, random_model
from tiny_types import tiny_config


@pytest.mark.parametrize("model_type", ["bloom", "cohere2", "deepseek_v3", "granite", "olmo3", "starcoder2"])
def test_every_removal_is_exact(model_type: str) -> None:
    assert model_type not in adapter_names()
    found = in_a_process(model_type)
    assert (found["adapter"], found["removals"]) == ("derived", ["exact"] * 4), found


@pytest.mark.parametrize("compensate", ["linear", "scale", "refit"])
@pytest.mark.parametrize("model_type", ["granite", "starcoder2"])
def test_layers_are_chosen_and_cuts_repaired(model_type: str, compensate: str, tmp_path: Path) -> None:
    random_model(tiny_config(model_type)).save_pretrained(tmp_path / "source")
    ids = plain_set(8, 32)
    report = prune(
        tmp_path / "source", tmp_path / "out", criterion="sglp", compensate=compensate, drop=2, calibration=ids
    )
    assert report.plan.compensation["method"] == compensate
    assert report.verification is not None


def test_where_the_end_of_the_mlp_is_not_found_nothing_is_folded(tmp_path: Path) -> None:
    random_model(tiny_config("deepseek_v3")).save_pretrained(tmp_path / "source")
    ids = plain_set(8, 32)
    settings = {"criterion": "bi", "drop": 2, "calibration": ids}
    report = prune(tmp_path / "source", tmp_path / "out", compensate="auto", **settings)
    assert (report.plan.replaced, report.plan.compensation) == ({}, {})
    with pytest.raises(UserError, match="the linear layer at the end of its MLP was not found; --compensate none"):
        prune(tmp_path / "source", tmp_path / "other", compensate="linear", **settings)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("verify", [True, False])
def test_a_choice_that_takes_a_layer_that_must_stay_is_refused_before_anything_is_written(
    verify: bool, tmp_path: Path
) -> None:
    random_model(tiny_config("gpt_neox_japanese")).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="layer 7 must stay: it alone has a bias behind its attention"):
        prune(
            tmp_path / "source", tmp_path / "out", criterion="reverse", drop=2, calibration=plain_set(8), verify=verify
        )
    assert not (tmp_path / "out").exists()
