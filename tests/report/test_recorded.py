"""``--record``: what was measured stands in the folder, its model card and its report, beside the original's numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import run_cli
from html_pages import page_of
from huggingface_hub import ModelCard
from tiny_models import Tiny, save_tiny, tiny_model

from sglp_llm.plan.results import Result, keep_results, read_results
from sglp_llm.report.numbers import shown

TEXT = ("--data", "pydoc", "--window", 16, "--max-windows", 4)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("recorded")
    source = save_tiny(tiny_model(Tiny("llama", 0)), place / "tiny")
    assert run_cli("prune", source, "--plan", "1,3", "-o", place / "pruned").code == 0
    return place / "pruned"


@pytest.fixture
def folder(pruned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "copy"))


def test_a_perplexity_stands_beside_the_originals(folder: Path, pruned: Path) -> None:
    assert run_cli("eval", folder, *TEXT, "--record").code == 0
    (result,) = read_results(folder)
    for model, value, error in (
        (folder, result.value, result.stderr),
        (pruned.parent / "tiny", result.original, result.original_stderr),
    ):
        plain = json.loads(run_cli("eval", model, *TEXT, "--json").out)
        assert (value, error) == (plain["perplexity"], plain["perplexity_standard_error"])
    assert result.conditions == "4 windows of 16 tokens, float32"

    card = ModelCard.load(folder / "README.md")
    (entry,) = [each for each in card.data.eval_results if each.metric_name == f"perplexity, {result.conditions}"]
    assert (entry.dataset_name, entry.metric_type, entry.metric_value) == (result.name, "perplexity", result.value)
    numbers = [shown(result.value, result.stderr), shown(result.original or 0, result.original_stderr)]
    page = page_of(folder)
    assert all(number in card.text and number in page.text for number in numbers)


def test_what_is_measured_again_takes_the_place_of_the_old(folder: Path) -> None:
    before = (folder / "README.md").read_text()
    (folder / "README.md").write_text(before + "\nWritten by hand.\n")
    for _ in range(2):
        assert run_cli("eval", folder, *TEXT, "--record").code == 0
    assert run_cli("eval", folder, *TEXT[:-1], 2, "--record").code == 0
    assert [each.conditions[:1] for each in read_results(folder)] == ["4", "2"]
    card = ModelCard.load(folder / "README.md")
    assert len(card.data.eval_results) == 2
    assert card.text.count("## Results") == 1
    assert card.text.rstrip().endswith("Written by hand.")


def test_speed_and_memory(folder: Path) -> None:
    options = ("--prompt-len", 4, "--new-tokens", 2, "--batch", 2, "--repeats", 1)
    outcome = run_cli("bench", folder, *options, "--record", "--json")
    assert outcome.code == 0
    report, results = json.loads(outcome.out), read_results(folder)
    for number, batch in enumerate((1, 2)):
        (rate,) = [
            each
            for each in results
            if each.metric == "decoded tokens a second" and f"batch {batch}," in each.conditions
        ]
        for value, model in ((rate.value, "model"), (rate.original, "baseline")):
            assert value == report[model]["speeds"][number]["decode_tokens_per_second"]["median"]
    assert "decoded tokens a second" in page_of(folder).text


def test_scores_of_tasks(folder: Path) -> None:
    command = ("eval", folder, "--suite", "generated", "--limit", 2, "--batch-size", 2)
    outcome = run_cli(*command, "--record", "--json")
    assert outcome.code == 0
    scores = json.loads(outcome.out)["scores"]
    found = [(each.name, each.value, each.original) for each in read_results(folder)]
    assert found == [(each["task"], each["value"], each["baseline"]["value"]) for each in scores]


def test_another_model_is_not_the_original(folder: Path, tmp_path: Path) -> None:
    other = save_tiny(tiny_model(Tiny("qwen2", 0)), tmp_path / "other")
    outcome = run_cli("eval", folder, *TEXT, "--record", "--baseline", other)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "give that one as --baseline" in outcome.err
    assert not (folder / "sglp_results.json").exists()


@pytest.mark.parametrize("verb", ["eval", "bench"])
def test_a_model_without_a_plan(verb: str, pruned: Path) -> None:
    outcome = run_cli(verb, pruned.parent / "tiny", "--record")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "a folder that prune or heal has written" in outcome.err


@pytest.mark.parametrize("damage", ["", "[]", '{"results": [3]}', '{"results": [{"name": 1}]}', "[" * 100_000])
def test_damaged_results_are_named(damage: str, folder: Path) -> None:
    (folder / "sglp_results.json").write_text(damage)
    outcome = run_cli("report", folder)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "sglp_results.json: " in outcome.err


def test_read_is_what_was_kept(tmp_path: Path) -> None:
    first = Result("piqa", "acc", "all examples", 0.5, 0.1, 0.6, 0.1, True)
    second = Result("text|name", "perplexity", "2 windows", 20.0, None, None, None, False)
    assert keep_results(tmp_path, [first]) == [first]
    assert keep_results(tmp_path, [second]) == [first, second] == read_results(tmp_path)
