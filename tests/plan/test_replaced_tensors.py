"""Plans with replaced tensors as files: read back as they were saved, refused when they are damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import run_cli
from replaced_plans import COMPENSATION, LLAMA, NORM, new_values, plan_with
from safetensors.torch import load_file
from tiny_models import (
    save_tiny,
    tiny_model,
)

from sglp_llm import PrunePlan, UserError, load_plan
from sglp_llm.plan import plan_to_dict, save_plan
from sglp_llm.plan.plans import plan_from_dict


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small Llama."""
    return save_tiny(tiny_model(LLAMA), tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def plan() -> PrunePlan:
    return plan_with(LLAMA, new_values(tiny_model(LLAMA), "model.layers"))


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def test_a_saved_plan_is_read_back_with_its_tensors(tmp_path: Path) -> None:
    """Whatever their dtype, order in memory and number of dimensions; the file is one that safetensors reads."""
    values = {
        f"model.layers.{n}.weight": torch.randn(3, 5, 2).permute(2, 0, 1).to(dtype) for n, dtype in enumerate(DTYPES)
    }
    values |= {"model.layers.0.scale": torch.tensor(2.5), "model.layers.0.none": torch.empty(0, 4)}
    plan = PrunePlan(6, (0, 1, 2, 3), replaced=values, compensation=COMPENSATION)
    for _ in range(2):  # the second time over the first
        save_plan(plan, tmp_path / "mine.json")
        found = load_plan(tmp_path / "mine.json")
        assert replace(found, replaced={}) == replace(plan, replaced={})
        for tensors in (found.replaced, load_file(tmp_path / "mine.tensors")):
            assert set(tensors) == set(values)
            for name, value in values.items():
                assert tensors[name].dtype == value.dtype
                assert torch.equal(tensors[name], value)
        plan = found


def test_a_plan_without_new_values_says_nothing_of_them(tmp_path: Path) -> None:
    save_plan(PrunePlan(4, (0, 3)), tmp_path / "plan.json")
    assert not {"replaced", "compensation"} & set(json.loads((tmp_path / "plan.json").read_text()))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


Damage = Callable[[Path], object]


def with_keys(**changes: Any) -> Damage:
    """Changes the JSON's entry about the tensors."""

    def damage(folder: Path) -> None:
        data = json.loads((folder / "sglp_plan.json").read_text())
        data["replaced"] = {key: value for key, value in {**data["replaced"], **changes}.items() if value is not None}
        (folder / "sglp_plan.json").write_text(json.dumps(data))

    return damage


def removing_layer_2(folder: Path) -> None:
    data = json.loads((folder / "sglp_plan.json").read_text())
    (folder / "sglp_plan.json").write_text(
        json.dumps({**data, "kept": None, "removed": [2]} | {"kept": [0, 1, 3, 4, 5]})
    )


def truncated(folder: Path) -> None:
    file = folder / "sglp_plan.tensors"
    file.write_bytes(file.read_bytes()[:-1])


def rubbish(folder: Path) -> None:
    (folder / "sglp_plan.tensors").write_bytes(b"rubbish")
    with_keys(sha256=hashlib.sha256(b"rubbish").hexdigest())(folder)


def another_plans(folder: Path) -> None:
    save_plan(PrunePlan(6, (0,), replaced={"model.layers.0.x": torch.ones(1)}), folder / "other.json")
    (folder / "other.tensors").rename(folder / "sglp_plan.tensors")


DAMAGES: list[tuple[Damage, str]] = [
    (
        lambda folder: (folder / "sglp_plan.tensors").unlink(),
        "tensors are missing: sglp_plan.tensors must lie beside it",
    ),
    (truncated, "sglp_plan.tensors does not hold the tensors that the plan was saved with"),
    (another_plans, "sglp_plan.tensors does not hold the tensors that the plan was saved with"),
    (rubbish, "not a valid safetensors file"),
    (
        with_keys(tensors={"model.layers.0.other": [1]}),
        "replaced: there is no 'model.layers.0.other' in sglp_plan.tensors",
    ),
    (with_keys(tensors={NORM: [31]}), f"replaced: '{NORM}' has the shape [32] in sglp_plan.tensors, not [31]"),
    (removing_layer_2, "belongs to layer 2, which the plan removes"),
    (with_keys(file="../sglp_plan.tensors"), "replaced.file must be a plain file name, not '../sglp_plan.tensors'"),
    (with_keys(file=3), "replaced.file must be a plain file name, not 3"),
    (with_keys(sha256=None), "replaced must have exactly file, sha256 and tensors"),
    (with_keys(more=1), "replaced must have exactly file, sha256 and tensors"),
    (with_keys(tensors=[NORM]), "replaced.tensors must be an object of shapes, not list"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_plan_files_that_are_refused(damage: Damage, message: str, tiny: Path, plan: PrunePlan, tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    save_plan(plan, tmp_path / "plan" / "sglp_plan.json")
    damage(tmp_path / "plan")
    outcome = run_cli("prune", tiny, "-o", tmp_path / "out", "--plan", tmp_path / "plan")
    assert outcome.code == 2
    assert message in outcome.error
    assert not (tmp_path / "out").exists()


def test_the_json_alone_is_no_compensated_plan(plan: PrunePlan) -> None:
    with pytest.raises(UserError, match="plan: replaced must have exactly file"):
        plan_from_dict(plan_to_dict(plan))
