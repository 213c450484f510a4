"""Healing recipes as YAML: read back, refused where they are wrong, and all that are shipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import run_cli

from sglp_llm.calibration import check_spec
from sglp_llm.errors import UserError
from sglp_llm.plan.healing_recipe import (
    HealingRecipe,
    healing_recipe_from_dict,
    load_healing_recipe,
    save_healing_recipe,
)
from sglp_llm.plan.shipped import shipped_healing_recipes


def test_a_saved_recipe_is_read_back(tmp_path: Path) -> None:
    recipe = HealingRecipe(train="lora", data="self:2 wikitext2", minutes=2.5, top_k=7, store=True, learning_rate=1e-5)
    save_healing_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_healing_recipe(tmp_path / "recipe.yaml") == recipe


def test_a_new_length_replaces_the_old_one() -> None:
    recipe = HealingRecipe(epochs=2.0)
    assert recipe.with_changes(tokens=5) == HealingRecipe(tokens=5)
    assert recipe.with_changes(seed=3) == replace(recipe, seed=3)
    assert recipe.with_changes(tokens=None) == recipe


@pytest.mark.parametrize(("train", "rate"), [("full", 2e-4), ("partial", 3e-4), ("seam", 5e-4), ("lora", 1e-3)])
def test_the_rate_depends_on_what_is_trained(train: str, rate: float) -> None:
    assert healing_recipe_from_dict({"train": train}).peak_rate == rate
    assert healing_recipe_from_dict({"train": train, "learning_rate": 0.5}).peak_rate == 0.5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tokns": 3}, "unknown key 'tokns'; did you mean 'tokens'?"),
        ({"tokens": 0}, "tokens must be above 0, not 0"),
        ({"tokens": 1, "epochs": 1}, "give one of tokens, minutes, epochs, not tokens and epochs"),
        ({"minutes": -1}, "minutes must be above 0, not -1.0"),
        ({"train": "all"}, "train must be auto or seam or lora or partial or full, not 'all'"),
        ({"held_out": 1}, "held_out must be between 0 and 1, both excluded, not 1.0"),
        ({"alpha": 1.5}, "alpha must be between 0 and 1, not 1.5"),
        ({"seq_len": 1}, "seq_len must be at least 2, not 1"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, not -1"),
        ({"distil": False, "teacher": "x"}, "teacher names a model, and distil is false"),
        ({"schedule": "steps"}, "schedule must be cosine or linear or constant, not 'steps'"),
        ([], "expected 'key: value' lines, not list"),
    ],
)
def test_recipes_that_are_refused(data: object, message: str) -> None:
    with pytest.raises(UserError) as raised:
        healing_recipe_from_dict(data, "mine")
    assert str(raised.value).startswith("mine: ")
    assert message in str(raised.value)


@pytest.mark.parametrize("name", shipped_healing_recipes())
def test_a_shipped_recipe_says_its_source_and_reads_what_there_is(name: str) -> None:
    recipe = load_healing_recipe(name)
    check_spec(recipe.data)
    assert sum(getattr(recipe, length) is not None for length in ("tokens", "minutes", "epochs")) == 1
    text = shipped_healing_recipes()[name].read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "published" in text or "arXiv" in text


def test_they_are_listed() -> None:
    listed = run_cli("ls", "healing-recipes").out
    assert all(name in listed for name in shipped_healing_recipes())
    with pytest.raises(UserError, match="unknown healing recipe 'kd-tinny'; did you mean 'kd-tiny'"):
        load_healing_recipe("kd-tinny")
