"""The suite generation_offline: its examples, its two metrics, and that lm-eval finds the metric of ours."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import run_cli, save_tiny, tiny_model
from helpers import ROOT, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.api.model import LM

from sglp_llm.evaluation.harness import OpenSuite, evaluate_tasks, open_suite, scores
from sglp_llm.evaluation.side_by_side import average
from sglp_llm.evaluation.suites import data_folder, load_suite

FOLDER = ROOT / "eval" / "generation_offline"
ANSWERED = ("sums", "copy", "facts")

repetition: Callable[[list[str], list[str]], float] = runpy.run_path(str(FOLDER / "repetition.py"))["repetition"]


@pytest.fixture(scope="module")
def opened() -> OpenSuite:
    return open_suite(load_suite("generation_offline"))


@pytest.fixture(scope="module")
def files() -> dict[str, Path]:
    folder = data_folder(load_suite("generation_offline"), None)
    assert folder is not None
    return {name: folder / f"generation_{name}.jsonl" for name in (*ANSWERED, "open")}


@pytest.fixture(scope="module")
def examples(files: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    return {name: list(map(json.loads, file.read_text().splitlines())) for name, file in files.items()}


def test_every_sum_is_right_and_its_answer_is_not_shown(examples: dict[str, list[dict[str, Any]]]) -> None:
    for row in examples["sums"]:
        *shots, asked = (row["prompt"] + " " + row["answer"]).split("\n")
        assert len(shots) == 4
        assert asked not in shots
        for line in (*shots, asked):
            first, plus, second, equals, total = line.split(" ")
            assert (plus, equals) == ("+", "=")
            assert int(first) + int(second) == int(total)
            assert min(int(first), int(second)) >= 10


def test_every_copy_is_the_row_before_it(examples: dict[str, list[dict[str, Any]]]) -> None:
    lengths = []
    for row in examples["copy"]:
        lines = (row["prompt"] + " " + row["answer"]).split("\n")
        assert len(set(lines)) == 5
        for line in lines:
            words, copy = line.split(": ")
            assert words == copy
        lengths.append(len(row["answer"].split()))
    assert lengths == [2, 3, 4, 5, 6] * 60


def test_a_fact_is_another_one_than_those_before_it(examples: dict[str, list[dict[str, Any]]]) -> None:
    starts = []
    for row in examples["facts"]:
        lines = (row["prompt"] + " " + row["answer"]).split("\n")
        assert len(set(lines)) == 5
        assert " " not in row["answer"]
        starts.append(lines[-1])
    # Kinds take turns, so that the first examples hold as much of each as all of them do.
    for kind, word in enumerate(["After", "The opposite of", "The capital of", "one", "in capital letters"]):
        assert all(word in line for line in starts[kind::5])
    for line in starts[4::5]:
        word, upper = line.split(" in capital letters: ")
        assert word.upper() == upper
    for line in starts[::5]:
        _, before, _, after = line.split(" ")
        assert not before.isdecimal() or int(after) == int(before) + 1
    assert {"After Monday comes Tuesday", "The capital of France is Paris", "one mouse, two mice"} <= {
        line for row in examples["facts"] for line in (row["prompt"] + " " + row["answer"]).split("\n")
    }


def test_the_examples_are_the_same_everywhere(files: dict[str, Path]) -> None:
    found = {name: hashlib.sha256(file.read_bytes()).hexdigest()[:12] for name, file in files.items()}
    assert found == {
        "sums": "e32b05e1da59",
        "copy": "d04245758c07",
        "facts": "777d819b4e55",
        "open": "f00216722ec7",
    }  # whatever the version of Python


@given(st.lists(st.sampled_from(["one", "2", "!", "?"]), min_size=4, max_size=60))
def test_repetition_is_that_of_brute_force(tokens: list[str]) -> None:
    # A 4-gram counts as repeated when it has occurred before.
    grams = [tokens[start : start + 4] for start in range(len(tokens) - 3)]
    again = sum(gram in grams[:start] for start, gram in enumerate(grams))
    assert repetition([""], [" ".join(tokens)]) == pytest.approx(again / len(grams))


@given(st.integers(4, 200))
def test_repetition_in_closed_form(length: int) -> None:
    assert repetition([""], ["over " * length]) == pytest.approx(1 - 1 / (length - 3))
    assert repetition([""], ["!" * length]) == pytest.approx(1 - 1 / (length - 3))
    assert repetition([""], [" ".join(map(str, range(length)))]) == 0
    twice = " ".join([*map(str, range(length))] * 2)
    assert repetition([""], [twice]) == pytest.approx(1 - length / (2 * length - 3))


def test_repetition_at_the_edges() -> None:
    assert [repetition([""], [text]) for text in ("", " \n\n ", "a" * 64, "one two three")] == [1.0] * 4
    assert repetition([""], ["one two three four"]) == 0
    assert repetition([""], ["one\ntwo  three\tfour"]) == repetition([""], ["one two three four"])
    assert repetition(["", ""], ["a b c d", ""]) == 0.5


class _Answers(LM):
    """A model that writes what it is told: the answer in some form."""

    def __init__(self, form: Callable[[str], str]) -> None:
        super().__init__()
        self.form = form

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [self.form(request.doc.get("answer", "")) for request in requests]

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.mark.parametrize(
    ("form", "value"),
    [
        (lambda answer: answer, 1.0),
        (lambda answer: f"  {answer} \t", 1.0),
        (lambda answer: f" {answer}.", 0.0),
        (lambda answer: f" {answer} {answer}", 0.0),
        (lambda answer: answer[:-1], 0.0),
        (lambda answer: "", 0.0),
    ],
)
def test_an_answer_is_right_as_a_whole(opened: OpenSuite, form: Callable[[str], str], value: float) -> None:
    tasks = [opened.tasks[f"generation_{name}"] for name in ANSWERED]
    results = simple_evaluate(_Answers(form), tasks=tasks, limit=20, bootstrap_iters=0, task_manager=opened.manager)
    assert {name: numbers["exact_match,stripped"] for name, numbers in results["results"].items()} == {
        f"generation_{name}": value for name in ANSWERED
    }


def test_repetition_is_that_of_the_models_own_greedy_continuation(
    opened: OpenSuite, examples: dict[str, list[dict[str, Any]]]
) -> None:
    model, tokenizer = tiny_model(max_position_embeddings=512), tiny_tokenizer(bos=True)
    expected = []
    for row in examples["open"][:6]:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        prompt = ids.shape[1]
        while ids.shape[1] < prompt + 64:
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            logits[model.config.eos_token_id] = -torch.inf  # the end of the text may not come early
            ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
        expected.append(repetition([""], [tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)]))
    found = scores(evaluate_tasks(model, tokenizer, opened, limit=6, batch_size=4), opened)
    assert [(score.task, score.metric) for score in found] == [
        *((f"generation_{name}", "exact_match") for name in ANSWERED),
        ("generation_open", "repetition"),
    ]
    assert found[-1].value == pytest.approx(sum(expected) / 6)
    assert [score.higher_is_better for score in found] == [True, True, True, False]
    mean = average(found)
    assert mean is not None
    assert (mean.metric, mean.value) == ("exact_match", pytest.approx(sum(score.value for score in found[:3]) / 3))


def test_the_table_of_the_suite_by_its_name(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny", max_position_embeddings=512)
    outcome = run_cli("eval", model, "--suite", "generation_offline", "--limit", 2, "--batch-size", 2)
    assert outcome.code == 0, outcome
    assert [line.split()[:2] for line in outcome.out.splitlines()[-5:]] == [
        ["generation_sums", "exact_match"],
        ["generation_copy", "exact_match"],
        ["generation_facts", "exact_match"],
        ["generation_open", "repetition"],
        ["average", "exact_match"],
    ]


def test_the_metric_lies_beside_its_task_wherever_that_is(tmp_path: Path) -> None:
    """As in a wheel, where the folder of the suites is another one than in a clone."""
    shutil.copytree(ROOT / "eval", tmp_path / "installed", ignore=shutil.ignore_patterns("__pycache__"))
    elsewhere = open_suite(load_suite(tmp_path / "installed" / "generation_offline.yaml"))
    (entry,) = elsewhere.tasks["generation_open"].config.metric_list
    assert Path(entry["metric"].__code__.co_filename).is_relative_to(tmp_path)
