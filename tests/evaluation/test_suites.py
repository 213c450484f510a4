"""Suites as YAML, the folder of the data, and the generator of examples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from sglp_llm.errors import UserError
from sglp_llm.evaluation.suites import Suite, data_folder, load_suite, local_files, suite_of

EVAL = ROOT / "eval"
GENERATOR = EVAL / "make_generated.py"


@pytest.mark.parametrize("path", sorted(EVAL.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_suites_of_the_repository_can_be_read(path: Path) -> None:
    suite = load_suite(path)
    assert suite.name == path.stem
    assert all(suite.tasks.values())
    if suite.include_path is not None:  # each task of ours is a file of its name
        prefix = suite.name.partition("_")[0]
        names = {f"{prefix}_{file.stem}" for file in Path(suite.include_path).glob("*.yaml")}
        assert names == set(suite.tasks)


def test_a_suite_has_a_name_and_a_path() -> None:
    assert load_suite("offline") == load_suite(EVAL / "offline.yaml")
    with pytest.raises(UserError, match="unknown suite 'ofline'; did you mean 'offline'"):
        load_suite("ofline")
    with pytest.raises(UserError, match="there is no such suite"):
        load_suite("ofline.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected 'key: value' lines"),
        ("name: x\ntasks: {piqa: acc}\nnum_fewshots: 3", "unknown key 'num_fewshots'; did you mean 'num_fewshot'?"),
        ("name: x", "the key 'tasks' is missing"),
        ("name: x\ntasks: {}", "tasks: there is none"),
        ("name: x\ntasks: [piqa]", "tasks must be 'name: text' lines"),
        ("name: x\ntasks: {piqa: 1}", "tasks must be 'name: text' lines"),
        ("name: x\ntasks: {piqa: acc}\nlimit: 0", "limit is 0"),
        ("name: x\ntasks: {piqa: acc}\nnum_fewshot: -1", "num_fewshot must not be negative"),
        ("name: x\ntasks: {piqa: acc}\nnum_fewshot: many", "num_fewshot must be a whole number"),
        ("name: x\ntasks: {piqa: acc}\ninclude_path: nowhere", "there is no folder"),
        ("name: x\ntasks: {piqa: acc}\ngenerate: nothing.py", "there is no file"),
        ("name: [", "not a YAML file"),
    ],
)
def test_a_wrong_suite_is_named_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_suite(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_suite(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such suite"):
        load_suite(tmp_path / "nothing.yaml")


def test_tasks_by_name() -> None:
    assert suite_of(" piqa, arc_easy,piqa").tasks == {"piqa": "", "arc_easy": ""}
    with pytest.raises(UserError, match="names no task"):
        suite_of(" ,")


def test_where_local_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": ["a.jsonl"], "dev": "b.jsonl"}}}
    suite = suite_of("a")
    monkeypatch.delenv("SGLP_EVAL_DATA", raising=False)
    assert data_folder(suite, None) is None
    with pytest.raises(UserError, match=r"reads the local file a\.jsonl: give --data-dir DIR, or set SGLP_EVAL_DATA"):
        local_files("a", config, None)
    monkeypatch.setenv("SGLP_EVAL_DATA", str(tmp_path))
    assert data_folder(suite, None) == tmp_path
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match=r"b\.jsonl: no such file; the task 'a' reads it"):
        local_files("a", config, tmp_path)
    (tmp_path / "b.jsonl").touch()
    assert local_files("a", config, tmp_path) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert local_files("a", {"dataset_path": "baber/piqa"}, None) == []
    other = tmp_path / "other"
    with pytest.raises(UserError, match=r"other: no such folder \(--data-dir\)"):
        data_folder(suite, other)
    other.mkdir()
    assert data_folder(suite, other) == other  # what is given goes before the variable


def test_examples_are_generated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    suite = load_suite(EVAL / "generated.yaml")
    folder = data_folder(suite, None)
    assert folder is not None
    assert folder.is_relative_to(tmp_path / "cache")
    own = {"agreement.jsonl", "arithmetic.jsonl", "copying.jsonl"}
    assert own < {file.name for file in folder.iterdir()}
    assert data_folder(load_suite(EVAL / "generation_offline.yaml"), None) == folder  # one script writes for both
    (folder / "agreement.jsonl").write_text("changed")
    assert data_folder(suite, None) == folder
    assert (folder / "agreement.jsonl").read_text() == "changed"
    assert sorted(file.name for file in folder.parent.iterdir()) == [folder.name]


def test_a_generator_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    script = tmp_path / "broken.py"
    script.write_text("import sys, pathlib\npathlib.Path(sys.argv[1]).mkdir()\nraise ValueError('no luck')")
    with pytest.raises(UserError, match=r"broken\.py: cannot generate the data \(ValueError: no luck\)"):
        data_folder(Suite("x", {"a": ""}, generate=str(script)), None)
    assert list((tmp_path / "cache" / "sglp-llm").iterdir()) == []


def test_generated_examples_are_right_and_the_same_everywhere(tmp_path: Path) -> None:
    for run in ("one", "two"):
        subprocess.run([sys.executable, GENERATOR, tmp_path / run], check=True)
    rows = {}
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
        rows[file.stem] = [json.loads(line) for line in file.read_text().splitlines()]
        assert len({json.dumps(row) for row in rows[file.stem]}) == len(rows[file.stem]) == 300
    for row in rows["agreement"]:
        good, bad = row["sentence_good"].split(), row["sentence_bad"].split()
        different = [index for index, pair in enumerate(zip(good, bad, strict=True)) if len(set(pair)) > 1]
        assert different == [5]
        assert (good[5] in ("are", "were", "have", "look")) == good[1].endswith("s")
        assert row["misleading"] == (good[1].endswith("s") != good[4].endswith("s"))
    for row in rows["arithmetic"]:
        first, _, second, _ = row["question"].splitlines()[-1].split()
        assert int(row["choices"][row["label"]]) == int(first) + int(second)
        assert len(set(row["choices"])) == 4
    assert {row["label"] for row in rows["arithmetic"]} == {0, 1, 2, 3}
    for row in rows["copying"]:
        first, second, third = (row["prompt"] + row["continuation"]).split("\n")
        assert first == second == third
    assert rows["arithmetic"][0]["question"].endswith("71 + 74 =")  # whatever the version of Python
