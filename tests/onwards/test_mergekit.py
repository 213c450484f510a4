"""``export --to mergekit``: the YAML, what it cannot hold, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from checkpoints import SMALL, run_cli, save_tiny
from gguf_files import write_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def pruned(tiny: Path) -> Path:
    folder = tiny.parent / "pruned"
    assert run_cli("prune", tiny, "--plan", "1,2,5", "-o", folder, "--no-verify").code == 0
    return folder


def test_the_yaml_names_the_original_and_the_kept_ranges(tiny: Path, pruned: Path, tmp_path: Path) -> None:
    outcome = run_cli("export", pruned, "--to", "mergekit", "-o", tmp_path / "x.yaml", "--json")
    assert json.loads(outcome.out) == {
        "files": [str(tmp_path / "x.yaml")],
        "notes": [],
        "next_command": f"mergekit-yaml {tmp_path / 'x.yaml'} OUTPUT",
    }
    sources = [[{"model": str(tiny), "layer_range": layers}] for layers in ([0, 1], [3, 5])]
    expected = {"merge_method": "passthrough", "slices": [{"sources": source} for source in sources]}
    assert yaml.safe_load((tmp_path / "x.yaml").read_text()) == expected


def test_by_default_it_lies_in_the_folder_and_is_not_replaced(pruned: Path) -> None:
    file = pruned / "mergekit.yaml"
    assert run_cli("export", pruned, "--to", "mergekit").code == 0
    text = file.read_text()
    assert f"{file}: already exists" in run_cli("export", pruned, "--to", "mergekit").error
    assert run_cli("export", pruned, "--to", "mergekit", "--overwrite").code == 0
    assert file.read_text() == text
    assert not list(pruned.glob(".*"))


def test_what_mergekit_cannot_know_is_said(tiny: Path, tmp_path: Path) -> None:
    options = ("--criterion", "bi", "--drop", 2, "--compensate", "scale", *SMALL)
    outcome = run_cli("prune", tiny, *options, "-o", tmp_path / "pruned", "--no-verify")
    assert outcome.code == 0, outcome.err
    changed = json.loads((tmp_path / "pruned" / "sglp_plan.json").read_text()).get("replaced")
    noted = (
        "the weights that the compensation changed are not in it"
        in run_cli("export", tmp_path / "pruned", "--to", "mergekit").out
    )
    assert noted == (changed is not None)


def test_families_that_mergekit_cannot_shorten_have_a_note(tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path / "tiny", "qwen2")
    assert run_cli("prune", tiny, "--plan", "1", "-o", tmp_path / "pruned", "--no-verify").code == 0
    assert "does not shorten layer_types" in run_cli("export", tmp_path / "pruned", "--to", "mergekit").out


def test_refused(pruned: Path, tmp_path: Path) -> None:
    assert "did you mean 'mergekit'?" in run_cli("export", pruned, "--to", "mergekitty").error
    assert "there is no such plan file" in run_cli("export", tmp_path, "--to", "mergekit").error
    assert "there is no folder" in run_cli("export", pruned, "--to", "mergekit", "-o", tmp_path / "a" / "b.yaml").error
    assert "is a folder" in run_cli("export", pruned, "--to", "mergekit", "-o", tmp_path).error
    gguf = write_gguf(tmp_path / "tiny.gguf")
    assert run_cli("prune", gguf, "--plan", "1", "-o", tmp_path / "from_gguf", "--no-verify").code == 0
    assert (
        "is a GGUF file, which mergekit does not read"
        in run_cli("export", tmp_path / "from_gguf", "--to", "mergekit").error
    )
