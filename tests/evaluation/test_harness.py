"""lm-eval on a live model: its numbers, its files, its own command, and what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from checkpoints import run_cli, save_tiny, tiny_model
from helpers import ROOT, tiny_tokenizer
from safetensors.torch import load_file, save_file

from sglp_llm.errors import UserError
from sglp_llm.evaluation.harness import evaluate_tasks, open_suite, scores
from sglp_llm.evaluation.suites import Suite, data_folder, load_suite

GENERATED = ROOT / "eval" / "generated.yaml"
OFFLINE = ROOT / "eval" / "offline.yaml"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=512)


def own_task(folder: Path, **changes: Any) -> Suite:
    """A suite of one task that is written here."""
    folder.mkdir(exist_ok=True)
    config = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "mine.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "label",
        "doc_to_choice": ["no", "yes"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    (folder / "mine.yaml").write_text(json.dumps(config))  # JSON is YAML too
    return Suite("mine", {"mine": "acc"}, include_path=str(folder))


def test_accuracy_is_what_the_models_own_log_probabilities_give() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(bos=True)
    suite = Suite(
        "one",
        {"generated_agreement": "acc"},
        **{key: getattr(load_suite(GENERATED), key) for key in ("include_path", "generate")},
    )
    model.train()
    results = evaluate_tasks(model, tokenizer, suite, limit=60)
    assert model.training  # as it was
    model.eval()
    folder = data_folder(suite, None)
    assert folder is not None
    right = 0
    for line in (folder / "agreement.jsonl").read_text().splitlines()[:60]:
        likelihoods = []
        for key in ("sentence_good", "sentence_bad"):
            # Of an empty prompt lm-eval makes the BOS token.
            ids = torch.tensor([[0, *tokenizer(json.loads(line)[key], add_special_tokens=False).input_ids]])
            with torch.no_grad():
                log = model(ids).logits.log_softmax(-1)
            likelihoods.append(float(log[0, :-1].gather(1, ids[0, 1:, None]).sum()))
        right += likelihoods[0] > likelihoods[1]
    found = scores(results, open_suite(suite))
    assert [(score.task, score.metric, score.value) for score in found] == [("generated_agreement", "acc", right / 60)]
    assert found[0].stderr == pytest.approx((right / 60 * (1 - right / 60) / 59) ** 0.5)


def test_the_same_tasks_twice_give_the_same_numbers() -> None:
    opened = open_suite(load_suite(GENERATED))
    model, tokenizer = tiny_model(max_position_embeddings=512), tiny_tokenizer(bos=True)
    options: dict[str, Any] = {"limit": 6, "batch_size": 4}
    first = evaluate_tasks(model, tokenizer, opened, **options)
    assert evaluate_tasks(model, tokenizer, opened, **options)["results"] == first["results"]
    assert first["n-samples"]["generated_copying"]["effective"] == 6
    shots = evaluate_tasks(model, tokenizer, opened, num_fewshot=2, **options)
    assert shots["n-shot"] == {"generated_agreement": 0, "generated_arithmetic": 2, "generated_copying": 2}
    assert shots["results"]["generated_copying"] != first["results"]["generated_copying"]


def test_the_table_and_the_file(tiny: Path, tmp_path: Path) -> None:
    outcome = run_cli(
        "eval", tiny, "--suite", GENERATED, "--limit", 8, "--batch-size", 8, "--baseline", tiny, "-o", tmp_path
    )
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert lines[:2] == [f"Model     {tiny}", f"Baseline  {tiny}"]
    assert lines[3].split() == ["task", "metric", "baseline", "±", "model", "±", "model/baseline"]
    assert [line.split()[0] for line in lines[4:8]] == [
        "generated_agreement",
        "generated_arithmetic",
        "generated_copying",
        "average",
    ]
    agreement = lines[4].split()
    assert agreement[2:4] == agreement[4:6]
    assert agreement[6] == "100.0%"
    files = sorted(tmp_path.rglob("*.json"))
    assert len(files) == 2  # one a model, in the folder of the model's name
    assert files[0].parent.name == str(tiny).replace("/", "__")
    written = json.loads(files[0].read_text())
    assert written["model_name"] == str(tiny)
    assert f"{written['results']['generated_agreement']['acc,none']:.4f}" == agreement[4]


def test_json_is_one_object_with_lm_evals_own_results_inside(tiny: Path) -> None:
    outcome = run_cli("eval", tiny, "--suite", GENERATED, "--limit", 8, "--json")
    report = json.loads(outcome.out)
    assert set(report) == {"model", "suite", "scores", "results"}
    assert [row["task"] for row in report["scores"]][-1] == "average"
    first = report["scores"][0]
    numbers = report["results"]["results"]["generated_agreement"]
    assert (first["value"], first["stderr"]) == (numbers["acc,none"], numbers["acc_stderr,none"])
    assert report["results"]["config"]["model_args"] == {"pretrained": str(tiny)}


def test_two_perplexities_side_by_side(tiny: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", num_hidden_layers=3)
    options = ("--data", "pydoc", "--window", 32, "--max-windows", 4)
    single = [json.loads(run_cli("eval", model, *options, "--json").out) for model in (tiny, other)]
    both = json.loads(run_cli("eval", tiny, "--baseline", other, *options, "--json").out)
    assert both.pop("ratio") == pytest.approx(single[0]["perplexity"] / single[1]["perplexity"])
    assert [both, both.pop("baseline")] == single
    outcome = run_cli("eval", tiny, "--baseline", other, *options)
    last = outcome.out.splitlines()[-1].split()
    assert last[:2] == ["pydoc:test", "perplexity"]
    assert last[2::2] == [
        f"{single[1]['perplexity']:.4f}",
        f"{single[0]['perplexity']:.4f}",
        f"{single[0]['perplexity'] / single[1]['perplexity']:.1%}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generated", "generation_offline"])
def test_the_plain_command_gives_every_number_alike(tiny: Path, tmp_path: Path, name: str) -> None:
    options = ("--limit", 50, "--batch-size", 4, "--json")
    ours = json.loads(run_cli("eval", tiny, "--suite", name, *options).out)["results"]
    folder = data_folder(load_suite(name), None)
    arguments = (
        f"--model hf --model_args pretrained={tiny} --limit 50 --batch_size 4 --device cpu --output_path {tmp_path}"
    )
    arguments += f" --include_path {ROOT / 'eval' / name} --tasks {','.join(ours['results'])}"
    subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments.split()],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    (file,) = tmp_path.rglob("results_*.json")
    theirs = json.loads(file.read_text())
    assert theirs["results"] == ours["results"]
    for key in ("n-shot", "n-samples", "higher_is_better", "versions"):
        assert theirs[key] == ours[key]


@pytest.mark.slow
def test_the_suites_name_tasks_and_metrics_that_lm_eval_has() -> None:
    index = lm_eval.tasks.TaskManager().task_index
    for path in sorted((ROOT / "eval").glob("*.yaml")):
        suite = load_suite(path)
        if suite.include_path is None:
            for task, metric in suite.tasks.items():
                config = index[task].cfg
                listed = config.get("metric_list") or config.get("aggregate_metric_list")
                assert metric.partition(",")[0] in [entry["metric"] for entry in listed], task


@pytest.mark.slow
def test_an_unknown_task_is_answered_with_the_nearest(tiny: Path) -> None:
    outcome = run_cli("eval", tiny, "--tasks", "piqaa")
    assert outcome.code == 2
    assert outcome.error.startswith("unknown task 'piqaa'; did you mean 'piqa'?")


def test_data_that_cannot_be_reached(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    own_task(tmp_path / "tasks", dataset_path="nobody/no-such-data", dataset_kwargs=None)
    (tmp_path / "suite.yaml").write_text("name: x\ntasks: {mine: acc}\ninclude_path: tasks")
    begin = time.perf_counter()
    outcome = run_cli("eval", tiny, "--suite", tmp_path / "suite.yaml")
    assert time.perf_counter() - begin < 15  # the Hub's client alone would try for 23 seconds
    assert outcome.code == 2
    assert outcome.error.startswith("mine: cannot read the data set nobody/no-such-data from the Hugging Face Hub (")
    assert "--suite offline --data-dir DIR" in outcome.error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question": "Why?", "label": 0', "cannot use"),
        ('{"query": "Why?", "label": 0}', "'question' is undefined"),
        ("", "cannot use"),
    ],
)
def test_local_data_that_do_not_fit(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.jsonl").write_text(text)
    with pytest.raises(UserError) as caught:
        open_suite(own_task(tmp_path / "tasks"), tmp_path)
    assert str(caught.value).startswith(f"mine: cannot use {tmp_path / 'mine.jsonl'} (")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_metric_that_the_task_lacks_is_found_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"question": "Why?", "label": 0}')
    suite = own_task(tmp_path / "tasks")
    with pytest.raises(UserError, match="mine: unknown metric 'ac'; did you mean 'acc'"):
        open_suite(Suite("x", {"mine": "ac"}, include_path=suite.include_path), tmp_path)


@pytest.mark.parametrize(
    ("suite", "what"), [("generated", "log-likelihood"), ("generation_offline", "logit")], ids=lambda value: value
)
def test_damaged_weights_are_not_scored(tmp_path: Path, suite: str, what: str) -> None:
    folder = save_tiny(tmp_path / "damaged", max_position_embeddings=512)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38  # finite, and the logits are not
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    outcome = run_cli("eval", folder, "--suite", suite, "--limit", 2, "--json")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1].startswith(f"sglp-llm: error: a {what} is not a number")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--suite", OFFLINE), "task 'offline_boolq' reads the local file boolq.jsonl.gz: give --data-dir DIR"),
        (("--suite", OFFLINE, "--tasks", "piqa"), "--suite already says which tasks"),
        (("--suite", OFFLINE, "--window", 64), "--window is about perplexity"),
        (("--data", "pydoc", "--limit", 3), "--limit is about tasks"),
        (("--suite", GENERATED, "--limit", 0), "limit is 0"),
        (("--suite", GENERATED, "--batch-size", "many"), "batch size must be auto or a number from 1, not 'many'"),
        (("--data", "pydoc", "--batch-size", "auto"), "--batch-size must be a number of windows, not 'auto'"),
        (("--suite", GENERATED, "--baseline", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_refusals(tiny: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[Any, ...], said: str) -> None:
    monkeypatch.delenv("SGLP_EVAL_DATA", raising=False)
    outcome = run_cli("eval", tiny, *options)
    assert outcome.code == 2
    assert said in outcome.error


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_automatic_batches_need_a_gpu() -> None:
    with pytest.raises(UserError, match="batch size auto needs a GPU"):
        evaluate_tasks(tiny_model(), tiny_tokenizer(bos=True), "piqa", batch_size="auto")
