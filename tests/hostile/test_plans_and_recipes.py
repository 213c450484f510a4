"""Hostile plans, their tensors, recipes, healing recipes, mergekit's YAML, suites, journals, and texts."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import SMALL, run_cli
from hostile import FUZZ, attempt, guarded, share
from hostile_data import ODD_FILES, as_json, changed, damaged, file_like
from hypothesis import given, settings
from hypothesis import strategies as st

from sglp_llm.errors import UserError
from sglp_llm.evaluation.suites import load_suite
from sglp_llm.plan import PLAN_FILE_NAME, save_plan
from sglp_llm.plan.healing_recipe import load_healing_recipe
from sglp_llm.plan.plans import plan_from_dict
from sglp_llm.tensor_files.tensors import sha256_of
from sglp_llm.trials import Journal

RESIDENT = ("--engine", "resident")


@pytest.fixture(scope="module")
def analysed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of analyze, with everything that a plan can hold."""
    folder = tmp_path_factory.mktemp("hostile") / "analysed"
    options = ("--drop", "2", "--criterion", "sglp", "--also", "bi", *SMALL, *RESIDENT)
    assert run_cli("analyze", source, *options, "-o", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def plan(analysed: Path) -> dict[str, Any]:
    return json.loads((analysed / PLAN_FILE_NAME).read_text()) | {
        "compensation": {"method": "linear", "cuts": [], "losses": {}}
    }


LOSSES = {"held_out": {"without": 2.0, "with": 1.0}}
TOLD: dict[str, dict[str, Any]] = {
    "settings": {
        "search": {"segments": [[0, 3], [3, 6]], "races": [{"race": "a", "sequences": 2, "costs": [["0,1", 0.5]]}]},
        "decode_times": {"depths": [6, 4], "seconds": [0.1, 0.05], "device": "cpu"},
        "context": 16,
        "removal_order": [4, 2],
    },
    "compensation": {
        "method": "linear",
        "cuts": [{"start": 2, "stop": 3}],
        "losses": LOSSES,
        "refined": {"losses": LOSSES},
    },
    "budget": {"target_latency": "0.8x", "target_memory": "1GB"},
    "versions": {"torch": "2"},
}
PLAN_WAYS = ("prune", "prune", "report", "export", "replan")


def try_plan(source: Path, content: bytes, way: str) -> int:
    """Gives a plan to a verb; its folder holds a model card's and a report's other sources too."""
    with tempfile.TemporaryDirectory() as place:
        inputs, output = Path(place) / "in", Path(place) / "out"
        inputs.mkdir()
        file = inputs / PLAN_FILE_NAME
        file.write_bytes(content)
        if way == "prune":
            options = ("--no-verify", *RESIDENT, "-o", output)
            return attempt("prune", source, "--plan", file, *options, inputs=inputs, output=output)
        if way == "export":
            return attempt("export", inputs, "--to", "mergekit", "-o", output, inputs=inputs, output=output)
        if way == "replan":
            return attempt(
                "replan", file, "--drop", "1", "--compensate", "none", "-o", output, inputs=inputs, output=output
            )
        with guarded():
            outcome = run_cli("report", inputs)
        assert outcome.code in (0, 2), outcome.err
        return outcome.code


@settings(max_examples=share("plans"), **FUZZ)
@given(data=st.data(), way=st.sampled_from(PLAN_WAYS))
def test_plans(source: Path, plan: dict[str, Any], data: st.DataObject, way: str) -> None:
    try_plan(source, data.draw(file_like(plan)), way)


@settings(max_examples=share("what plans tell"), **FUZZ)
@given(
    data=st.data(),
    way=st.sampled_from(PLAN_WAYS),
    key=st.sampled_from(["settings", "compensation", "budget", "versions"]),
)
def test_what_plans_tell(source: Path, plan: dict[str, Any], data: st.DataObject, way: str, key: str) -> None:
    """The parts that are plain data, which reports show as far as they have the form of our own."""
    told = TOLD[key] | plan[key]
    try_plan(source, as_json({**plan, key: data.draw(changed(told, 1) | changed(told))}), way)


@settings(max_examples=share("tensors of plans"), **FUZZ)
@given(data=st.data())
def test_tensors_of_plans(source: Path, data: st.DataObject) -> None:
    good = {
        "model.layers.1.mlp.down_proj.weight": torch.zeros(32, 48),
        "model.layers.3.input_layernorm.weight": torch.ones(32),
    }
    with tempfile.TemporaryDirectory() as place:
        inputs, output = Path(place) / "in", Path(place) / "out"
        inputs.mkdir()
        file = inputs / PLAN_FILE_NAME
        made = plan_from_dict({"num_layers": 6, "removed": [2, 4]})
        save_plan(type(made)(6, made.kept, replaced=good), file)
        tensors = file.with_suffix(".tensors")
        if data.draw(st.booleans()):
            name = data.draw(
                st.sampled_from(
                    ["model.layers.\u0663.x", "model.layers.2.x", "a.1.b", "model.layers.99999999999.x", "", "x"]
                )
            )
            written = tensors.read_bytes().replace(
                b"model.layers.3.input_layernorm.weight", name.encode()[:37].ljust(37, b"y")
            )
        else:
            written = data.draw(damaged(tensors.read_bytes()[:300])) + tensors.read_bytes()[300:]
        tensors.write_bytes(written)
        said = json.loads(file.read_text())
        said["replaced"]["sha256"] = sha256_of(tensors)  # as who made it would
        file.write_bytes(data.draw(changed(said, 1).map(as_json)) if data.draw(st.booleans()) else as_json(said))
        options = ("--no-verify", *RESIDENT, "-o", output)
        attempt("prune", source, "--plan", file, *options, inputs=inputs, output=output)


RECIPE = {
    "model": "nowhere",
    "criterion": "search",
    "also": ["gate", "angular"],
    "options": {"search": {"budget": "1k", "objective": "kl"}, "gate": {"order": 1}, "angular": {"tokens": "all"}},
    "calibration": SMALL[1],
    "samples": 2,
    "seq_len": 8,
    "trial_samples": 1,
    "drop": 1,
    "protect": {"first": 1, "last": 0},
    "num_segments": "auto",
    "compensate": "none",
    "heal": {"tokens": 64, "train": "lora"},
    "held_out": 0.25,
    "engine": "resident",
    "max_shard_size": "1GB",
}


def as_yaml(data: Any) -> bytes:
    """YAML of plain data; of halves of surrogate pairs and the like JSON, which is YAML too."""
    try:
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode()
    except (UnicodeEncodeError, yaml.YAMLError):
        return as_json(data)


def yaml_like(data: Any) -> st.SearchStrategy[bytes]:
    """YAML of changed data, damaged YAML of good data, or another file."""
    return st.one_of(changed(data).map(as_yaml), changed(data).map(as_yaml), damaged(as_yaml(data)), ODD_FILES)


@settings(max_examples=share("recipes"), **FUZZ)
@given(data=st.data(), verb=st.sampled_from(["analyze", "prune", "plan-memory"]))
def test_recipes(source: Path, data: st.DataObject, verb: str) -> None:
    good = (
        RECIPE
        if verb == "plan-memory"
        else {**RECIPE, "heal": False, "criterion": "gate", "also": ["angular"], "options": {"gate": {"order": 1}}}
    )
    with tempfile.TemporaryDirectory() as place:
        inputs, output = Path(place) / "in", Path(place) / "out"
        inputs.mkdir()
        (inputs / "mine.yaml").write_bytes(data.draw(yaml_like(good)))
        options = () if verb == "plan-memory" else ("-o", output)
        written = None if verb == "plan-memory" else output
        attempt(verb, source, "--recipe", inputs / "mine.yaml", *options, inputs=inputs, output=written)


HEALING = {
    "tokens": 100,
    "train": "lora",
    "lora_rank": 4,
    "data": "pydoc",
    "alpha": 0.5,
    "schedule": "linear",
    "top_k": 8,
}
SUITE = {
    "name": "mine",
    "tasks": {"piqa": "acc", "arc_easy": ""},
    "num_fewshot": 0,
    "limit": 3,
    "include_path": ".",
    "generate": None,
}
MERGEKIT = {
    "merge_method": "passthrough",
    "slices": [
        {"sources": [{"model": "m", "layer_range": [0, 2]}]},
        {"sources": [{"model": "m", "layer_range": [3, 6]}]},
    ],
}


def try_loading(load: Callable[[Path], object], content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place, guarded():
        file = Path(place) / "mine.yaml"
        file.write_bytes(content)
        with suppress(UserError):
            load(file)


@settings(max_examples=share("healing recipes"), **FUZZ)
@given(content=yaml_like(HEALING))
def test_healing_recipes(content: bytes) -> None:
    try_loading(load_healing_recipe, content)


@settings(max_examples=share("suites"), **FUZZ)
@given(content=yaml_like(SUITE))
def test_suites(content: bytes) -> None:
    try_loading(load_suite, content)


@settings(max_examples=share("plans of mergekit"), **FUZZ)
@given(data=st.data())
def test_plans_of_mergekit(source: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        inputs, output = Path(place) / "in", Path(place) / "out"
        inputs.mkdir()
        (inputs / "mine.yaml").write_bytes(data.draw(yaml_like(MERGEKIT)))
        options = ("--no-verify", *RESIDENT, "-o", output)
        attempt("prune", source, "--plan", inputs / "mine.yaml", *options, inputs=inputs, output=output)


VALUES = {"numbers": {"perplexity": 3.5}, "losses": [1.0, 2.0]}


@settings(max_examples=share("journals"), **FUZZ)
@given(data=st.data(), which=st.sampled_from(["piece", "piece", "setting"]))
def test_journals(data: st.DataObject, which: str) -> None:
    """A damaged piece is made again, and has the value it had; of a damaged setting nobody knows what it was."""
    with tempfile.TemporaryDirectory() as place, guarded():
        folder = Path(place) / "journal"
        journal = Journal(folder, {"model": "a"})
        assert journal.once("one", lambda: VALUES) == VALUES
        (setting,) = [file for file in folder.iterdir() if '"setting"' in file.read_text()]
        (piece,) = set(folder.iterdir()) - {setting}
        file = setting if which == "setting" else piece
        good = file.read_bytes()
        file.write_bytes(data.draw(file_like(json.loads(good))))
        with suppress(UserError) if which == "setting" else nullcontext():
            assert Journal(folder, {"model": "a"}).once("one", lambda: VALUES) == VALUES


LINES = [
    {"text": "The quick brown fox jumps over the lazy dog. " * 4, "messages": [{"role": "user", "content": "Hi"}]}
] * 3


@settings(max_examples=share("texts"), **FUZZ)
@given(
    data=st.data(),
    form=st.sampled_from(["text:{}", "jsonl:{}:text", "chat:{}"]),
    packed=st.booleans(),
    verb=st.sampled_from(["prune", "eval"]),
)
def test_texts(source: Path, data: st.DataObject, form: str, packed: bool, verb: str) -> None:
    lines = [as_json(data.draw(changed(line, 1))) if data.draw(st.booleans()) else as_json(line) for line in LINES]
    content = b"\n".join(lines)
    content = data.draw(st.one_of(st.just(content), damaged(content), ODD_FILES, st.binary(max_size=200)))
    if packed:
        content = gzip.compress(content, mtime=0)
        content = data.draw(st.just(content) | damaged(content))
    with tempfile.TemporaryDirectory() as place:
        inputs, output = Path(place) / "in", Path(place) / "out"
        inputs.mkdir()
        file = inputs / ("text.gz" if packed else "text")
        file.write_bytes(content)
        if verb == "eval":
            attempt("eval", source, "--data", form.format(file), "--window", "8", *RESIDENT, inputs=inputs)
            return
        options = ("--calibration", form.format(file), "--samples", "2", "--seq-len", "8", *RESIDENT, "-o", output)
        attempt("prune", source, "--drop", "2", "--criterion", "bi", *options, inputs=inputs, output=output)


def test_the_good_ones_pass(source: Path, plan: dict[str, Any], tmp_path: Path) -> None:
    """Otherwise nothing behind the first check would be tried."""
    assert [try_plan(source, as_json(plan), way) for way in PLAN_WAYS] == [0] * len(PLAN_WAYS)
    for name, data in {"recipe": RECIPE, "healing": HEALING, "suite": SUITE, "mergekit": MERGEKIT}.items():
        (tmp_path / f"{name}.yaml").write_bytes(as_yaml(data))
    assert run_cli("plan-memory", source, "--recipe", tmp_path / "recipe.yaml").code == 0
    load_healing_recipe(tmp_path / "healing.yaml")
    load_suite(tmp_path / "suite.yaml")
