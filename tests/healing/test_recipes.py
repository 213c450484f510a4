"""What the shipped recipes need beyond plain distillation, from the command line to the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import run_cli
from helpers import TEXT
from tiny_models import Tiny, files_of, load_plain, save_tiny, tensors_of, tiny_model

SMALL: tuple[object, ...] = (
    *("--tokens", 256, "--seq-len", 32, "--sequences", 2, "--learning-rate", 0.001, "--dtype", "float32"),
)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    original = save_tiny(tiny_model(Tiny("llama", 0)), folder / "tiny")
    template = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    asking = "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    (original / "chat_template.jinja").write_text(template + asking)
    (folder / "plan.json").write_text('{"num_layers": 6, "removed": [2, 3]}')
    assert run_cli("prune", original, "--plan", folder / "plan.json", "-o", folder / "out", "--no-verify").code == 0
    return folder / "out"


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{"instruction": f"word{number}", "output": "never used"} for number in range(40)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "questions.jsonl"


@pytest.mark.parametrize(
    ("name", "changed_layers"), [("seam-mse", {1, 2}), ("seam-pair", {1, 2}), ("streamline", {1}), ("seam-kd", {1, 2})]
)
def test_recipes_for_the_layers_at_the_cut(name: str, changed_layers: set[int], pruned: Path, tmp_path: Path) -> None:
    more = ("--data", TEXT, "--held-out", 0.2)
    outcome = run_cli("heal", pruned, "-o", tmp_path / "out", "--recipe", name, *SMALL, *more, "--json")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)["record"]
    compared = name != "seam-kd"
    assert ("hidden_state_loss" in record["before"]) == compared
    if compared:
        assert record["after"]["hidden_state_loss"] < record["before"]["hidden_state_loss"]
    before, after = tensors_of(pruned), tensors_of(tmp_path / "out")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {int(key.split(".")[2]) for key in changed} == changed_layers
    assert [sorted(file) for file in files_of(pruned)] == [sorted(file) for file in files_of(tmp_path / "out")]


def test_answers_of_the_original(pruned: Path, questions: Path, tmp_path: Path) -> None:
    more = ("--data", f"chat:{questions}", "--lora-rank", 2, "--held-out", 0.2, "--seq-len", 64)
    options = ("--recipe", "self-sft", *SMALL, *more, "--learning-rate", 0.01, "--tokens", 1024)
    outcome = run_cli("heal", pruned, "-o", tmp_path / "out", *options, "--json")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)["record"]
    assert record["data"] == f"chat:{questions}, answered by the teacher"
    assert record["before"]["loss"] == record["before"]["next_token_loss"]
    (kept,) = (tmp_path / "cache" / "sglp-llm" / "answers").glob("*.jsonl")
    assert "never" not in kept.read_text()
    load_plain(tmp_path / "out")


def test_the_student_writes(pruned: Path, tmp_path: Path) -> None:
    more = ("--data", TEXT, "--prompt-tokens", 8, "--shortest", 4, "--held-out", 0.2)
    outcome = run_cli("heal", pruned, "-o", tmp_path / "out", "--recipe", "on-policy", *SMALL, *more, "--json")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)["record"]
    assert record["after"]["divergence"] < record["before"]["divergence"]
    load_plain(tmp_path / "out")


REFUSED = [
    (("--hidden-weight", 0.5, "--no-teacher"), "hidden_weight compares with the teacher, and distil is false"),
    (("--hidden-weight", 0.5, "--store-teacher"), "hidden_weight needs the teacher in memory, and store is true"),
    (("--hidden-weight", 2), "hidden_weight must be between 0 and 1, not 2.0"),
    (("--on-policy", 1, "--no-teacher"), "on_policy asks the teacher, and distil is false"),
    (("--on-policy", 1, "--prompt-tokens", 30), "prompt_tokens 30 and shortest 16 are more than seq_len 32"),
    (("--answers", "teacher"), "is not one source of conversations: give alpaca or chat:FILE"),
    (("--answers", "teacher", "--no-teacher"), "answers are to be the teacher's, and distil is false"),
    (("--answers", "nobody"), "answers must be data or teacher, not 'nobody'"),
    (("--seam-side", "left"), "seam_side must be both or before or behind, not 'left'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_one_line_for_what_cannot_be(options: tuple[object, ...], message: str, pruned: Path, tmp_path: Path) -> None:
    outcome = run_cli("heal", pruned, "-o", tmp_path / "out", *SMALL, "--data", TEXT, *options)
    assert outcome.code == 2
    assert message in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_minutes_cannot_be_known_for_what_is_written(pruned: Path, tmp_path: Path) -> None:
    options = ("--data", TEXT, "--minutes", 1, "--on-policy", 1)
    assert "give tokens, not minutes" in run_cli("heal", pruned, "-o", tmp_path / "out", *options).error
