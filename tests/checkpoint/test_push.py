"""What of a folder is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from checkpoints import SMALL, run_cli, save_tiny, written
from helpers import TEXT

from sglp_llm.checkpoint.push import published_files
from sglp_llm.errors import UserError
from sglp_llm.plan import load_plan, load_recipe
from sglp_llm.plan.healing_recipe import load_healing_recipe

FILES = {
    "tokenizer.json": '{"/home/me": 1}',
    "vocab.json": '{"/home/me": 1}',
    "merges.txt": "/ home",
    "x/notes.txt": "/home/me",
}


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to which every kind of path has come: of the models, of text, of a journal and of scratch, and peft's own."""
    folder = tmp_path_factory.mktemp("private") / "my folder"
    folder.mkdir()
    source = save_tiny(folder / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": str(folder / "original")}))
    (folder / "text.txt").write_text(Path(TEXT.removeprefix("text:")).read_text())
    (folder / "journal").mkdir()
    (folder / "scratch").mkdir()
    text = f"text:{folder / 'text.txt'}"
    options = ("--criterion", "search", "--compensate", "linear", "--journal", folder / "journal", "--drop", 1)
    options += (*SMALL, "--calibration", text, "--samples", 8)
    outcome = run_cli("prune", source, "-o", folder / "pruned", *options)
    assert outcome.code == 0, outcome
    options = (
        "--teacher",
        source,
        "--data",
        text,
        "--tokens",
        128,
        "--seq-len",
        16,
        "--sequences",
        2,
        "--train",
        "lora",
    )
    options += ("--keep-adapter", "--scratch", folder / "scratch")
    outcome = run_cli("heal", folder / "pruned", "-o", folder / "healed", *options)
    assert outcome.code == 0, outcome
    return folder / "healed"


def test_no_path_of_this_machine_is_published(healed: Path, tmp_path: Path) -> None:
    private = str(healed.parent.parent)
    assert private in (healed / "sglp_plan.json").read_text()  # as local commands need it
    for name in ("README.md", "report.html"):
        assert private not in (healed / name).read_text()
    files = published_files(healed, "me/short")
    here = {path.relative_to(healed).as_posix() for path in healed.rglob("*") if path.is_file()}
    assert set(files) == here - {"adapter/README.md"}
    for name, content in files.items():
        found = content if isinstance(content, bytes) else content.read_bytes()
        assert private.encode() not in found, name
        assert b"my folder" not in found, name
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(found)
    # What is published is a plan and recipes again.
    ours, theirs = load_plan(healed), load_plan(tmp_path)
    assert (theirs.removed, theirs.scores, theirs.similarity) == (ours.removed, ours.scores, ours.similarity)
    assert theirs.replaced.keys() == ours.replaced.keys()
    assert theirs.source is not None
    assert theirs.source.name == "source"
    assert theirs.settings["calibration"] == "text:text.txt"
    recipe = load_recipe(tmp_path / "sglp_recipe.yaml")
    assert (recipe.model, recipe.journal, recipe.calibration) == ("source", "journal", "text:text.txt")
    healing = load_healing_recipe(tmp_path / "sglp_healing_recipe.yaml")
    assert (healing.teacher, healing.scratch, healing.data) == ("source", "scratch", "text:text.txt")
    record = json.loads((tmp_path / "sglp_healing.json").read_text())
    assert (record["student"]["name"], record["teacher"]["name"]) == ("pruned", "source")
    assert json.loads((tmp_path / "config.json").read_text())["_name_or_path"] == "original"
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert 'from_pretrained("me/short")' in (tmp_path / "README.md").read_text()


def test_what_holds_no_path_is_published_as_it_is(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    (folder / "x").mkdir()
    for name, text in FILES.items():
        written(name, text)(folder)
    recipe = "# by hand\nmodel: owner/name\nratio: 0.25\n"
    written("sglp_recipe.yaml", recipe)(folder)
    written(".env", "SECRET=1")(folder)
    (folder / ".git").mkdir()
    written(".git/config", "")(folder)
    files = published_files(folder, "me/short")
    assert {name for name in files if name.startswith(".")} == set()
    assert all(content == folder / name for name, content in files.items())
    assert {*FILES, "sglp_recipe.yaml", "config.json"} <= set(files)


def test_a_tokenizer_and_a_recipe_that_say_where_they_are_from(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    origins = {"name_or_path": "/home/me/x", "tokenizer_file": "/home/me/t.json", "pad_token": "/pad", "chat": "~/x"}
    written("tokenizer_config.json", json.dumps({**origins, "auto": {"name_or_path": "owner/name"}}))(folder)
    written("sglp_recipe.yaml", "model: /home/me/x\nheal:\n  teacher: ../y\n")(folder)
    files = published_files(folder, "me/short")
    assert json.loads(bytes(files["tokenizer_config.json"])) == {
        **origins,
        "name_or_path": "x",
        "tokenizer_file": "t.json",
        "auto": {"name_or_path": "owner/name"},
    }
    assert yaml.safe_load(bytes(files["sglp_recipe.yaml"])) == {"model": "x", "heal": {"teacher": "y"}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sglp_plan.json", "{", "sglp_plan.json: not a JSON file"),
        ("config.json", b"\xff", "config.json: not a JSON file"),
        ("sglp_recipe.yaml", "a: [", "sglp_recipe.yaml: not a YAML file"),
        ("README.md", b"\xff", "README.md: cannot read the model card"),
    ],
)
def test_damaged_files(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    written(name, content)(folder)
    with pytest.raises(UserError, match=message):
        published_files(folder, "me/short")
