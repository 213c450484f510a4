"""No code of a checkpoint runs, whatever a user answers, and none is carried into an output."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
from checkpoints import SMALL, copied, edited, in_turn, logits, run_cli, save_tiny, written

from sglp_llm.errors import UserError
from sglp_llm.models import find_source
from sglp_llm.models.loading import find_tokenizer, load_tokenizer

EVIL = "tokenizer_evil.py"


def evil(marker: Path) -> str:
    imported = "from transformers import PreTrainedTokenizerFast"
    return f"open({str(marker)!r}, 'w')\n{imported}\nclass Evil(PreTrainedTokenizerFast):\n    pass\n"


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer is a class of its own; it leaves ``ran`` beside the folder when it is imported."""
    plain = save_tiny(tmp_path / "plain")
    damage = in_turn(
        written(EVIL, evil(tmp_path / "ran")),
        written("tokenizer.pkl", b"\x80\x04."),
        written("vocab.pickle", b"\x80\x04."),
        edited(
            "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": [None, "tokenizer_evil.Evil"]}
        ),
    )
    return copied(plain, tmp_path / "remote", damage)


def test_no_question_is_asked_and_no_code_runs(remote: Path, tmp_path: Path) -> None:
    with patch("builtins.input", return_value="y") as asked:
        outcome = run_cli("prune", remote, "--drop", "1", "--preset", "paper", *SMALL, "-o", tmp_path / "out")
    assert outcome.code == 2
    assert "needs remote code (auto_map), which is not run: name another one with --tokenizer" in outcome.error
    assert not asked.called
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("load", [find_tokenizer, lambda folder: load_tokenizer(find_source(folder))])
def test_the_library_refuses_it_too(remote: Path, tmp_path: Path, load: object) -> None:
    with patch("builtins.input", return_value="y"), pytest.raises(UserError, match="needs remote code"):
        load(remote)  # type: ignore[operator]
    assert not (tmp_path / "ran").exists()


def test_another_tokenizer_is_the_way_on_and_no_code_is_carried(remote: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = run_cli("prune", remote, "--plan", "2,4", "--tokenizer", tmp_path / "plain", "-o", out)
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "ran").exists()
    assert not {file.suffix for file in out.rglob("*")} & {".py", ".pkl", ".pickle"}
    kept = json.loads((remote / "tokenizer_config.json").read_text())
    del kept["auto_map"]
    assert json.loads((out / "tokenizer_config.json").read_text()) == kept
    assert (out / "tokenizer.json").read_bytes() == (remote / "tokenizer.json").read_bytes()
    assert logits(out).equal(logits(remote, skip=(2, 4)))


def test_a_tokenizer_configuration_without_code_is_carried_as_it_is(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "plain")
    assert run_cli("prune", source, "--plan", "2,4", "-o", tmp_path / "out").code == 0
    name = "tokenizer_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_code_for_a_model_that_transformers_has_is_not_named_in_the_output(tmp_path: Path) -> None:
    """Such as Phi-3's: the classes in auto_map are those that transformers has itself."""
    native = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM", "AutoConfig": "configuration_phi3.Phi3Config"}
    source = copied(
        save_tiny(tmp_path / "plain", "phi3"),
        tmp_path / "source",
        in_turn(edited("config.json", auto_map=native), written("modeling_phi3.py", evil(tmp_path / "ran"))),
    )
    assert run_cli("prune", source, "--plan", "2", "-o", tmp_path / "out").code == 0
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py"))
    assert not (tmp_path / "ran").exists()
