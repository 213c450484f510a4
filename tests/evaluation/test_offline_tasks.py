"""The tasks on local files: what they ask, against lm-eval's own."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from helpers import ROOT
from lm_eval.tasks._yaml_loader import load_yaml

from sglp_llm.evaluation.harness import open_suite
from sglp_llm.evaluation.suites import load_suite

OFFLINE = ROOT / "eval" / "offline.yaml"
THEIRS = Path(lm_eval.tasks.__file__).parent

ROWS: dict[str, dict[str, Any]] = {
    "hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "A man [title] bakes.",
        "ctx_b": "he",
        "endings": ["eats.", "runs.", "flies.", "sinks."],
        "label": "2",
    },
    "piqa": {"goal": "Open a door", "sol1": "Push.", "sol2": "Sing.", "label": 0},
    "arc_easy": {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"},
    "arc_challenge": {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["1", "2"]}, "answerKey": "1"},
    "winogrande": {"sentence": "Ann met Eve when _ fell.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    "boolq": {"passage": "Ice -- Ice is cold.", "question": "is ice cold", "label": 1},
    "openbookqa": {
        "question_stem": "The sun is",
        "choices": {"text": ["hot", "wet", "old", "far"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
    },
    "lambada": {"text": "she opened the door and saw the garden"},
    "blimp": {"sentence_good": "Dogs bark.", "sentence_bad": "Dogs barks.", "UID": "x"},
}
"""One row of the data of each offline task."""

EXPECTED = {
    "hellaswag": ("Baking: A man. bakes. He", ["eats.", "runs.", "flies.", "sinks."], 2),
    "piqa": ("Question: Open a door\nAnswer:", ["Push.", "Sing."], 0),
    "arc_easy": ("Question: Why?\nAnswer:", ["so", "no"], 1),
    "arc_challenge": ("Question: Why?\nAnswer:", ["so", "no"], 0),
    "winogrande": (1, ["Ann met Eve when Ann", "Ann met Eve when Eve"], "fell."),
    "boolq": ("Ice -- Ice is cold.\nQuestion: is ice cold?\nAnswer:", ["no", "yes"], 1),
    "openbookqa": ("The sun is", ["hot", "wet", "old", "far"], 0),
    "lambada": ("she opened the door and saw the", None, " garden"),
    "blimp": ("", ["Dogs bark.", "Dogs barks."], 0),
}
"""Prompt, choices and answer of each."""

SAME_TASK = {
    "hellaswag": "hellaswag/hellaswag",
    "piqa": "piqa/piqa",
    "arc_easy": "arc/arc_easy",
    "arc_challenge": "arc/arc_challenge",
    "winogrande": "winogrande/default",
    "boolq": "super_glue/boolq/default",
    "openbookqa": "openbookqa/openbookqa",
    "lambada": "lambada/lambada_openai",
    "blimp": "blimp/adjunct_island",
}
"""lm-eval's own file of each."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with one row for each offline task."""
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress((json.dumps(row) + "\n").encode() * 3))
    return tmp_path


@pytest.mark.parametrize("name", SAME_TASK)
def test_offline_tasks_ask_as_lm_evals_own(name: str) -> None:
    ours = load_yaml(OFFLINE.with_suffix("") / f"{name}.yaml")
    theirs = load_yaml(THEIRS / f"{SAME_TASK[name]}.yaml")
    for key in ("output_type", "doc_to_text", "doc_to_choice", "doc_to_target", "num_fewshot", "process_docs"):
        left, right = (getattr(config.get(key), "__name__", config.get(key)) for config in (ours, theirs))
        assert left == right, key
    metrics = [[entry["metric"] for entry in config["metric_list"]] for config in (ours, theirs)]
    assert metrics[0] == metrics[1]


def test_offline_tasks_read_the_fields_of_the_data(data: Path) -> None:
    opened = open_suite(load_suite(OFFLINE), data)
    assert len(opened.tasks) == len(ROWS)
    for name, (prompt, choices, answer) in EXPECTED.items():
        task = opened.tasks[f"offline_{name}"]
        doc = next(iter(task.test_docs()))
        found = task.doc_to_text(doc), None if choices is None else task.doc_to_choice(doc), task.doc_to_target(doc)
        assert (found[0], found[1]) == (prompt, choices)
        assert str(found[2]) == str(answer)
