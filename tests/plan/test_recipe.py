"""Recipes: what is written is read back, every mistake has a message, and those that are shipped work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglp_llm.analysis.observing import check_criteria
from sglp_llm.calibration import check_spec
from sglp_llm.compensation import NONE, compensation_names
from sglp_llm.criteria import criterion_names
from sglp_llm.errors import UserError
from sglp_llm.method.selection import check_budget
from sglp_llm.plan import Recipe, load_recipe, preset_names, preset_settings, save_recipe
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.plan.recipe import SGLP, Protect, recipe_from_dict
from sglp_llm.plan.shipped import preset_description, shipped_recipes
from sglp_llm.sizes import parse_bytes

POSITIVE = st.integers(1, 10**6)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
WHOLE = st.integers(-(2**63), 2**63 - 1)
RECIPES = st.builds(
    Recipe,
    model=st.none() | TEXT,
    revision=st.none() | TEXT,
    dtype=st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
    device_map=st.none() | TEXT,
    calibration=TEXT,
    samples=POSITIVE,
    seq_len=st.integers(2, 10**6),
    seed=WHOLE,
    journal=st.none() | TEXT.filter(bool),
    engine=st.sampled_from(["auto", "streamed"]),
    scratch=st.none() | TEXT.filter(bool),
    batch_size=POSITIVE,
    criterion=TEXT,
    also=st.lists(TEXT, max_size=3).map(tuple),
    kernel=st.sampled_from(["cosine", "linear"]),
    minibatch_sequences=POSITIVE,
    minibatch_positions=POSITIVE,
    segments=st.none() | st.booleans(),
    num_segments=st.just("auto") | POSITIVE,
    features=st.sampled_from(["column_sum", "rows"]),
    min_drop=st.floats(0, 1),
    protect=st.builds(Protect, st.integers(0, 99), st.integers(0, 99)),
    ratio=st.none() | st.floats(0, 1),
    drop=st.none() | WHOLE,
    target_params=st.none() | WHOLE,
    target_memory=st.none() | TEXT,
    target_latency=st.none() | TEXT,
    context=st.none() | st.integers(1, 2**63 - 1),
    compensate=TEXT,
    held_out=st.floats(0.01, 0.99),
    heal=st.sampled_from([False, True, {"tokens": 5}, {"train": "lora", "minutes": 2.0}]),
    max_shard_size=st.none() | st.sampled_from(["2GB", "1.5GiB"]),
)


@given(recipe=RECIPES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
def test_a_saved_recipe_is_read_back_whole(recipe: Recipe, tmp_path: Path) -> None:
    save_recipe(recipe, tmp_path / "mine.yaml")
    assert load_recipe(tmp_path / "mine.yaml") == recipe
    assert recipe_from_dict(recipe.to_dict()) == recipe
    assert recipe.with_changes() == recipe


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text("# nothing\n")
    assert load_recipe(str(tmp_path / "mine.yml")) == Recipe()


def test_nested_protect(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("protect:\n  first: 4\nratio: 1\nalso: [bi, magnitude]\nnum_segments: auto\n")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe == Recipe(protect=Protect(4, 0), ratio=1.0, also=("bi", "magnitude"))
    assert type(recipe.ratio) is float


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"critrion": "bi"}, "unknown key 'critrion'; did you mean 'criterion'?"),
    ({"seqlen": 4}, "unknown key 'seqlen'; did you mean 'seq_len'?"),
    ({"xyzzy": 4}, "unknown key 'xyzzy'. Known: also, batch_size,"),
    ({4: 4}, "unknown key '4'"),
    ({"protect": {"frst": 4}}, "protect: unknown key 'frst'; did you mean 'first'?"),
    ({"protect": 4}, "protect: expected 'key: value' lines, not int"),
    ({"protect": {"first": "4"}}, "protect: first must be a whole number, not '4'"),
    ({"protect": {"last": None}}, "protect: last must be a whole number, not None"),
    ({"protect": {"first": -1}}, "protect: first must not be negative, not -1"),
    ({"protect": {"last": -2}}, "protect: last must not be negative, not -2"),
    ({"samples": "8"}, "samples must be a whole number, not '8'"),
    ({"samples": 8.0}, "samples must be a whole number, not 8.0"),
    ({"samples": True}, "samples must be a whole number, not True"),
    ({"samples": None}, "samples must be a whole number, not None"),
    ({"samples": 0}, "samples must be at least 1, not 0"),
    ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ({"minibatch_sequences": 0}, "minibatch_sequences must be at least 1, not 0"),
    ({"minibatch_positions": -1}, "minibatch_positions must be at least 1, not -1"),
    ({"seq_len": 1}, "seq_len must be at least 2, not 1"),
    ({"engine": "stream"}, "engine must be auto or resident or streamed, not 'stream'"),
    ({"engine": "resident", "scratch": "x"}, "scratch is for the streamed engine"),
    ({"num_segments": 0}, "num_segments must be at least 1, not 0"),
    ({"num_segments": "many"}, "num_segments must be a whole number or auto, not 'many'"),
    ({"num_segments": 2.5}, "num_segments must be a whole number or auto, not 2.5"),
    ({"min_drop": -0.1}, "min_drop must not be negative, not -0.1"),
    ({"min_drop": float("nan")}, "min_drop must not be negative, not nan"),
    ({"min_drop": "5%"}, "min_drop must be a number, not '5%'"),
    ({"held_out": 0}, "held_out must be between 0 and 1, not 0.0"),
    ({"held_out": 1.5}, "held_out must be between 0 and 1, not 1.5"),
    ({"held_out": float("nan")}, "held_out must be between 0 and 1, not nan"),
    ({"compensate": None}, "compensate must be text, not None"),
    ({"ratio": "0.25"}, "ratio must be a number, not '0.25'"),
    ({"ratio": True}, "ratio must be a number, not True"),
    ({"drop": 1.5}, "drop must be a whole number, not 1.5"),
    ({"model": 4}, "model must be text, not 4"),
    ({"dtype": "float8"}, "dtype must be auto or bfloat16 or float16 or float32, not 'float8'"),
    ({"kernel": ["cosine"]}, "kernel must be cosine or linear, not ['cosine']"),
    ({"features": None}, "features must be column_sum or rows, not None"),
    ({"also": "bi"}, "also must be a list of texts, not 'bi'"),
    ({"also": ["bi", 4]}, "also must be a list of texts, not ['bi', 4]"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=str)
def test_every_mistake_has_a_message_that_names_the_file(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(change))
    with pytest.raises(UserError) as raised:
        load_recipe(file)
    assert str(raised.value).startswith(f"{file}: {message}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "not a YAML file"),
        (b"[" * 100_000, "not a YAML file that can be read (nested too deeply)"),
        (b"seed: 2020-99-99", "not a YAML file (month must be in 1..12)"),
        (b"{[1]: 2}", "not a YAML file"),
        (b"- a", "expected 'key: value' lines, not list"),
        (b"just text", "expected 'key: value' lines, not str"),
        (b"\xff\xff", "cannot read the recipe"),
        (b"!!python/object/apply:os.system ['true']", "not a YAML file"),
    ],
)
def test_files_that_are_no_recipes(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_recipe(file)
    assert str(raised.value).startswith(f"{file}: {message}")
    assert "\n" not in str(raised.value)


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such recipe"):
        load_recipe(tmp_path / "mine.yaml")
    with pytest.raises(UserError, match="unknown recipe 'llama-2-7'; did you mean 'llama-2-7b'"):
        load_recipe("llama-2-7")


def test_changes_that_are_none_change_nothing_and_the_others_are_checked() -> None:
    recipe = Recipe(samples=4, ratio=0.5, also=("bi",))
    assert recipe.with_changes(samples=None, seed=3, also=[]) == Recipe(samples=4, ratio=0.5, seed=3, also=())
    assert recipe.with_changes(num_segments=5, protect=Protect(1, 2)).protect == Protect(1, 2)
    with pytest.raises(UserError, match="settings: unknown key 'sample'; did you mean 'samples'"):
        recipe.with_changes(sample=3)
    with pytest.raises(UserError, match="settings: samples must be a whole number, not '3'"):
        recipe.with_changes(samples="3")
    assert recipe == Recipe(samples=4, ratio=0.5, also=("bi",))


@pytest.mark.parametrize("budget", [{"ratio": 0.1}, {"drop": 3}, {"target_params": 10**9}, {"target_memory": "6GB"}])
def test_a_new_budget_replaces_the_old_one_whole(budget: dict[str, Any]) -> None:
    for old in ({"ratio": 0.5}, {"drop": 1}, {"target_params": 5}, {"target_memory": "1GB", "context": 9}):
        assert Recipe(**old).with_changes(**budget).budget.to_dict() == budget


def test_one_side_of_protect_is_changed_alone() -> None:
    recipe = Recipe(protect=Protect(4, 2))
    assert recipe.with_changes(protect={"last": 3}).protect == Protect(4, 3)
    assert recipe.with_changes(protect={"first": 0}).protect == Protect(0, 2)


def test_there_are_shipped_recipes() -> None:
    assert "opt-125m" in shipped_recipes()


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_names_what_there_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.model
    assert {recipe.criterion, *recipe.also} <= {SGLP, *criterion_names()}
    check_spec(recipe.calibration)
    check_budget(recipe.budget, 12, (recipe.protect.first, recipe.protect.last))
    assert recipe.max_shard_size is None or parse_bytes(recipe.max_shard_size)


@pytest.mark.parametrize("name", preset_names())
def test_presets_say_how_and_not_of_what(name: str) -> None:
    settings = preset_settings(name)
    assert settings.keys().isdisjoint({"model", "revision", "ratio", "drop", "target_params", "calibration"})
    recipe = Recipe().with_changes(**settings)
    assert recipe.criterion in {SGLP, *criterion_names()}
    assert recipe.compensate in {NONE, *compensation_names()}
    check_criteria(recipe)
    assert preset_description(name).endswith(".")


def test_no_preset_changes_nothing() -> None:
    assert Recipe().with_changes(**preset_settings(None)) == Recipe()
    with pytest.raises(UserError, match="unknown preset 'bset'; did you mean 'best'"):
        preset_settings("bset")


def test_the_training_after_the_removal() -> None:
    recipe = Recipe(calibration="c4", seed=3, engine="streamed", scratch="s")
    assert recipe.healing is None
    shared = HealingRecipe(data="c4", seed=3, engine="streamed", scratch="s")
    assert recipe.with_changes(heal=True).healing == shared
    trained = recipe.with_changes(heal={"tokens": 5, "train": "lora"})
    assert trained.healing == replace(shared, tokens=5, train="lora")
    assert trained.with_changes(heal=True, calibration="wikitext2").healing == replace(
        shared, tokens=5, train="lora", data="wikitext2"
    )
    assert trained.with_changes(heal={"minutes": 2, "data": "self"}).healing == replace(
        shared, minutes=2.0, train="lora", data="self"
    )
    assert trained.with_changes(heal=False).healing is None
    with pytest.raises(UserError, match=r"settings: heal: unknown key 'tokns'; did you mean 'tokens'\?"):
        recipe.with_changes(heal={"tokns": 5})
    with pytest.raises(
        UserError, match=r"settings: heal must be true or false or settings such as \{key: value\}, not 3"
    ):
        recipe.with_changes(heal=3)


def test_options_join_those_there_are() -> None:
    recipe = Recipe(options={"search": {"proposals": 8, "budget": 1}, "bi": {}})
    changed = recipe.with_changes(options={"search": {"budget": "5m"}, "angular": {"tokens": "all"}})
    assert changed.options == {
        "search": {"proposals": 8, "budget": "5m"},
        "bi": {},
        "angular": {"tokens": "all"},
    }
    assert recipe.options == {"search": {"proposals": 8, "budget": 1}, "bi": {}}
