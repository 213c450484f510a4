"""mergekit's YAML and ours say the same: which layers of one model stay."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import run_cli, save_tiny
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tensors_of

from sglp_llm.errors import UserError
from sglp_llm.plan import plan_from_indices
from sglp_llm.plan.mergekit import mergekit_yaml, plan_from_mergekit

MERGEKIT = shutil.which("mergekit-yaml") or shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent))


def passthrough(*ranges: Any, **changes: Any) -> dict[str, Any]:
    slices = [{"sources": [{"model": "m", "layer_range": layers}]} for layers in ranges]
    return {"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16", **changes}


@given(data=st.data(), depth=st.integers(2, 40), model=st.text(min_size=1))
def test_what_is_written_is_read_back(data: st.DataObject, depth: int, model: str) -> None:
    removed = data.draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=depth - 1))
    plan = plan_from_indices(depth, removed)
    text = mergekit_yaml(plan, model.replace("+", "-"))
    decoded = yaml.safe_load(text)
    assert {source["model"] for entry in decoded["slices"] for source in entry["sources"]} == {model.replace("+", "-")}
    assert plan_from_mergekit(decoded, depth, "x.yaml") == plan


def test_ranges_are_half_open_and_the_gaps_are_removed() -> None:
    assert plan_from_mergekit(passthrough([0, 2], [3, 5]), 7, "x.yaml").removed == (2, 5, 6)
    # Adjacent slices are one: mergekit's own tools write a slice a layer.
    assert plan_from_mergekit(passthrough([1, 2], [2, 3]), 4, "x.yaml").removed == (0, 3)


SLICE = {"sources": [{"model": "m", "layer_range": [0, 2]}]}
TWO = {"sources": [{"model": "m", "layer_range": [0, 2]}, {"model": "n", "layer_range": [0, 2]}]}
OTHER = {"sources": [{"model": "n", "layer_range": [2, 4]}]}
LORA = {"sources": [{"model": "m+lora", "layer_range": [0, 2]}]}
SCALED = {"sources": [{"model": "m", "layer_range": [0, 2], "parameters": {"scale": 0}}]}

REFUSED: dict[str, tuple[object, str]] = {
    "no mapping": ([], "must be 'key: value' lines"),
    "duplicated layers": (passthrough([0, 4], [2, 6]), "starts at 2 after one that ends at 4: a plan removes layers"),
    "reordered layers": (passthrough([3, 6], [0, 3]), "neither repeats nor reorders"),
    "two models": (passthrough(slices=[SLICE, OTHER]), "the slices name 'm' and 'n'"),
    "two sources": (passthrough(slices=[TWO]), "2 sources"),
    "a LoRA": (passthrough(slices=[LORA]), "without a LoRA"),
    "scaled weights": (passthrough(slices=[SCALED]), "'parameters' is more than a plan can do"),
    "another method": (passthrough([0, 2], merge_method="slerp"), "must be passthrough, not 'slerp'"),
    "whole models": ({"models": [{"model": "m"}], "merge_method": "passthrough"}, "'models' is more than"),
    "no slices": ({"merge_method": "passthrough"}, "slices must be a list"),
    "empty slices": (passthrough(), "all 6 layers would be removed"),
    "too deep": (passthrough([0, 10**15]), "ends at 1000000000000000, and the model has 6 decoder layers"),
    "empty range": (passthrough([2, 2]), "holds no layer"),
    "negative": (passthrough([-1, 2]), "holds no layer"),
    "no range": (passthrough("0-3"), "must be [start, stop]"),
    "everything": (passthrough([0, 6]), "no layer would be removed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_plan_cannot_say_is_refused(name: str) -> None:
    data, message = REFUSED[name]
    with pytest.raises(UserError, match=r"^(x\.yaml|the plan)") as raised:
        plan_from_mergekit(data, 6, "x.yaml")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_three_forms_of_a_plan_give_the_same_checkpoint(tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path / "tiny")
    (tmp_path / "plan.json").write_text('{"num_layers": 6, "removed": [2, 5]}')
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(passthrough([0, 2], [3, 5])))
    written = []
    for number, plan in enumerate(("2, 5", tmp_path / "plan.yaml", tmp_path / "plan.json")):
        outcome = run_cli("prune", tiny, "--plan", plan, "-o", tmp_path / str(number), "--no-verify")
        assert outcome.code == 0, outcome.err
        written.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]


def test_mistakes_in_a_plan_of_another_form_are_one_line(tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path / "tiny")
    (tmp_path / "twice.yml").write_text(yaml.safe_dump(passthrough([0, 4], [2, 6])))
    for plan, message in (
        ("6", "layer 6 is not in 0..5"),
        ("1,1", "twice"),
        ("0,1,2,3,4,5", "all 6 layers would be removed"),
        (tmp_path / "twice.yml", "neither repeats nor reorders"),
        (tmp_path / "none.yaml", "there is no such plan"),
        ("1,", "there is no such plan file"),
    ):
        outcome = run_cli("prune", tiny, "--plan", plan, "-o", tmp_path / "out")
        assert outcome.code == 2
        assert message in outcome.error
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(MERGEKIT is None, reason="needs mergekit-yaml on the PATH: pip install mergekit")
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "olmo2"])
def test_mergekit_gives_the_same_tensors(family: str, tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path / "tiny", family)
    assert run_cli("prune", tiny, "--plan", "1,3", "-o", tmp_path / "ours", "--no-verify").code == 0
    exported = run_cli("export", tmp_path / "ours", "--to", "mergekit")
    assert exported.code == 0, exported.err
    command = [MERGEKIT, tmp_path / "ours" / "mergekit.yaml", tmp_path / "theirs"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.equal(theirs[name]), name
