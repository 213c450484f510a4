"""``heal`` from a shortened checkpoint to a trained one, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import Outcome, copied, edited, run_cli, without, written
from checkpoints import save_tiny as save_other
from helpers import TEXT
from tiny_models import Tiny, files_of, load_plain, logits_of, save_tiny, tensors_of, tiny_model

from sglp_llm import load_plan
from sglp_llm.healing import heal as module
from sglp_llm.healing.heal import heal
from sglp_llm.plan.healing_recipe import load_healing_recipe

SETTINGS: dict[str, object] = {"data": TEXT, "tokens": 256, "seq-len": 16, "sequences": 2, "learning-rate": 0.001}


def short(**changes: object) -> tuple[object, ...]:
    """Options of a short run; those that are None are left out."""
    given = {**SETTINGS, "dtype": "float32", **{name.replace("_", "-"): value for name, value in changes.items()}}
    return tuple(each for name, value in given.items() if value is not None for each in (f"--{name}", value))


SHORT = short()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_model(Tiny("llama", 0)), tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def pruned(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    (folder / "plan.json").write_text('{"num_layers": 6, "removed": [2, 3]}')
    assert run_cli("prune", original, "--plan", folder / "plan.json", "-o", folder / "out", "--no-verify").code == 0
    return folder / "out"


@pytest.fixture(scope="module")
def healed(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    output = tmp_path_factory.mktemp("healed") / "out"
    return output, run_cli("heal", pruned, "-o", output, *SHORT, "--json")


def test_the_result_is_an_ordinary_checkpoint(pruned: Path, healed: tuple[Path, Outcome]) -> None:
    output, outcome = healed
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["verification"]["max_difference"] == 0
    before, after = tensors_of(pruned), tensors_of(output)
    assert {name: (each.shape, each.dtype) for name, each in before.items()} == {
        name: (each.shape, each.dtype) for name, each in after.items()
    }
    assert not any(torch.equal(each, after[name]) for name, each in before.items() if each.ndim > 1)
    assert [sorted(file) for file in files_of(pruned)] == [sorted(file) for file in files_of(output)]
    load_plain(output)
    assert not output.with_name("out.healing").exists()
    assert not list(output.parent.glob(".*"))


def test_what_stands_beside_the_weights(original: Path, pruned: Path, healed: tuple[Path, Outcome]) -> None:
    output, outcome = healed
    record = json.loads((output / "sglp_healing.json").read_text())
    assert record == json.loads(outcome.out)["record"]
    assert load_plan(output) == load_plan(pruned)
    assert record["teacher"]["name"] == str(original)
    assert record["data"] == TEXT
    assert (record["steps"], record["sequences"], record["held_out"]) == (8, 16, 1)
    assert record["tokens"] == record["best_step"] * 2 * 16
    assert record["after"]["divergence"] < record["before"]["divergence"]
    recipe = load_healing_recipe(output / "sglp_healing_recipe.yaml")
    assert (recipe.tokens, recipe.learning_rate, recipe.train) == (256, 0.001, "full")
    log = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 9))
    assert {"loss.png", "loss.svg"} <= {path.name for path in output.iterdir()}
    card = (output / "README.md").read_text()
    assert f"Retrained on the original model's predictions: {record['tokens']} tokens of `text:LICENSE`" in card
    assert "the rest retrained" in card


def test_healed_again_without_a_teacher(healed: tuple[Path, Outcome], tmp_path: Path) -> None:
    outcome = run_cli("heal", healed[0], "-o", tmp_path / "out", *SHORT, "--no-teacher", "--train", "seam", "--seed", 1)
    assert outcome.code == 0, outcome.err
    lines = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert lines["Teacher"] == "none"
    assert "Divergence" not in outcome.out
    assert "Next-token loss" in outcome.out
    assert "equal in float32" in lines["Reload"]


def test_an_adapter_is_merged_and_may_be_kept(pruned: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    options = (*short(learning_rate=0.01), "--train", "lora", "--lora-rank", 2, "--keep-adapter")
    outcome = run_cli("heal", pruned, "-o", tmp_path / "out", *options)
    assert outcome.code == 0, outcome.err
    merged = load_plain(tmp_path / "out")
    adapted = PeftModel.from_pretrained(load_plain(pruned), tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits_of(merged), logits_of(load_plain(pruned)), atol=1e-3)


@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_a_stored_teacher_teaches_like_one_in_memory(engine: str, pruned: Path, tmp_path: Path) -> None:
    options = (*SHORT, "--top-k", 8, "--json")
    losses = []
    for number, more in enumerate((("--online-teacher",), ("--store-teacher", "--engine", engine))):
        outcome = run_cli("heal", pruned, "-o", tmp_path / str(number), *options, *more)
        assert outcome.code == 0, outcome.err
        log = (tmp_path / str(number) / "train_log.jsonl").read_text().splitlines()
        losses.append([line.get("loss", line.get("eval_loss")) for line in map(json.loads, log)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_half_precision_stays(original: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    load_plain(original).to(torch.bfloat16).save_pretrained(half)
    for file in original.glob("*token*"):
        (half / file.name).write_bytes(file.read_bytes())
    (tmp_path / "plan.json").write_text('{"num_layers": 6, "removed": [2, 3]}')
    assert run_cli("prune", half, "--plan", tmp_path / "plan.json", "-o", tmp_path / "short", "--no-verify").code == 0
    outcome = run_cli("heal", tmp_path / "short", "-o", tmp_path / "out", *SHORT, "--json")
    assert outcome.code == 0, outcome.err
    assert {each.dtype for each in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads(outcome.out)["verification"]["max_difference"] == 0


def test_minutes_become_steps(pruned: Path, tmp_path: Path) -> None:
    report = heal(
        pruned, tmp_path / "out", data=TEXT, minutes=0.02, seq_len=16, sequences=2, verify=False, dtype="float32"
    )
    assert report.record.steps >= 1
    assert report.seconds["training"] < 20


def test_an_interrupted_run_is_asked_about_and_goes_on(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    whole = run_cli("heal", pruned, "-o", tmp_path / "whole", *SHORT, "--json")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "export", killed)
        assert run_cli("heal", pruned, "-o", output, *SHORT).code == 130
    assert not output.exists()
    assert "out.healing holds an interrupted run" in run_cli("heal", pruned, "-o", output, *SHORT).error
    other = (*short(tokens=128), "--resume")
    assert "with another" in run_cli("heal", pruned, "-o", output, *other).err.splitlines()[-1]
    outcome = run_cli("heal", pruned, "-o", output, *SHORT, "--resume", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["record"] == json.loads(whole.out)["record"]
    for name, value in tensors_of(tmp_path / "whole").items():
        assert torch.equal(value, tensors_of(output)[name])
    assert "there is no interrupted run" in run_cli("heal", pruned, "-o", tmp_path / "new", *SHORT, "--resume").error


REFUSED: list[tuple[dict[str, object], tuple[object, ...], str]] = [
    ({"tokens": 0}, (), "'0' is not a number such as 100M or 6.5B"),
    ({"tokens": "64M"}, (), "ask for fewer tokens (at most 8320)"),
    ({"minutes": 1}, (), "give one of tokens, minutes, epochs, not tokens and minutes"),
    ({"tokens": None, "minutes": 0.000001}, (), "one step takes"),
    ({"train": "most"}, (), "train must be auto or seam or lora or partial or full, not 'most'"),
    ({"data": "jsonl:{data}:missing"}, (), "there is no field 'missing'"),
    ({"data": "nothing"}, (), "unknown calibration set 'nothing'"),
    ({"data": f"{TEXT} self"}, ("--no-teacher",), "the original model writes the text"),
    ({"data": "self", "tokens": None, "epochs": 1}, (), "give tokens, not epochs"),
    ({"data": f"{TEXT} jsonl:{{data}}:text", "tokens": None, "minutes": 0.02}, (), "data.jsonl:text: the text has "),
    ({"data": f"{TEXT} jsonl:{{data}}:text", "tokens": None, "epochs": 1}, (), "a mixture needs a number of tokens"),
    ({"teacher": "{other}"}, (), "is not the model that the plan was made for"),
    ({"teacher": "{gone}"}, (), "there is no such folder or file"),
    ({}, ("--no-teacher", "--store-teacher"), "store keeps the teacher's logits, and distil is false"),
    ({"train": "full"}, ("--keep-adapter",), "keep_adapter is about LoRA, and train is full"),
    ({"batch_size": 3}, (), "are not a multiple of 1 processes x batch_size 3"),
    ({"batch_size": "many"}, (), "batch_size must be auto or a whole number, not 'many'"),
    ({"recipe": "kd-tinny"}, (), "unknown healing recipe 'kd-tinny'"),
    ({"learning_rate": 50}, (), "healing made nothing better"),
    ({"alpha": 2}, (), "alpha must be between 0 and 1, not 2.0"),
]


@pytest.mark.parametrize(("changes", "more", "message"), REFUSED)
def test_one_line_for_what_cannot_be(
    changes: dict[str, object], more: tuple[object, ...], message: str, pruned: Path, tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "words"}\n')
    other = save_other(tmp_path / "other", num_hidden_layers=5)
    named = {"data": tmp_path / "data.jsonl", "other": other, "gone": tmp_path / "gone"}
    chosen = {key: each.format(**named) if isinstance(each, str) else each for key, each in changes.items()}
    outcome = run_cli("heal", pruned, "-o", tmp_path / "out", *short(**chosen), *more)
    assert outcome.code == 2
    last = [line for line in outcome.err.splitlines() if line.startswith("sglp-llm: error: ")]
    assert len(last) == 1
    assert message in last[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "other"]


def test_students_that_cannot_be_healed(original: Path, pruned: Path, tmp_path: Path) -> None:
    def error(student: Path, *more: object) -> str:
        return run_cli("heal", student, "-o", tmp_path / "out", *SHORT, *more).error

    assert "no sglp_plan.json names the original model" in error(
        copied(pruned, tmp_path / "a", without("sglp_plan.json"))
    )
    wider = copied(pruned, tmp_path / "b", edited("sglp_plan.json", kept=[0, 1, 2, 4, 5], removed=[3]))
    assert "the plan leaves 5 decoder layers, and the model has 4" in error(wider)
    vocabulary = save_other(tmp_path / "c", vocab_size=400)
    unplanned = copied(pruned, tmp_path / "d", without("sglp_plan.json"))
    assert "has a vocabulary of 400 tokens" in error(unplanned, "--teacher", vocabulary)
    adapter = tmp_path / "e"
    adapter.mkdir()
    written("adapter_config.json", "{}")(adapter)
    assert "a PEFT adapter, not a model" in error(adapter)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    assert "exists" in error(pruned)
    assert (
        "train seam: there is no sglp_plan.json"
        in run_cli("heal", unplanned, "-o", tmp_path / "new", *SHORT, "--no-teacher", "--train", "seam").error
    )


def test_where_to(pruned: Path) -> None:
    assert run_cli("heal", pruned).error == "where to? Give --output FOLDER"


def test_pruned_and_healed_in_one_go(original: Path, tmp_path: Path) -> None:
    options = ("--criterion", "bi", "--calibration", TEXT, "--samples", 4, "--seq-len", 16, "--drop", 2)
    (tmp_path / "recipe.yaml").write_text(
        "seq_len: 16\nsequences: 2\nlearning_rate: 0.001\ndtype: float32\ndata: pydoc\n"
    )
    more = ("--heal", "--heal-tokens", 128, "--heal-recipe", tmp_path / "recipe.yaml", "--json")
    outcome = run_cli("prune", original, "-o", tmp_path / "out", *options, *more)
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["healing"]["record"]["steps"] == 4
    assert report["healing"]["record"]["data"] == "pydoc:train"
    assert load_plan(tmp_path / "out").removed == tuple(report["plan"]["removed"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]
    load_plain(tmp_path / "out")
    again = run_cli("prune", original, "-o", tmp_path / "out", *options, *more)
    assert "exists" in again.error
    no_training = ("--no-heal", "--heal-tokens", 64)
    assert "leave out --no-heal" in run_cli("prune", original, "-o", tmp_path / "new", *options, *no_training).error


def test_text_that_the_original_writes(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mixed = short(data=f"self:3 {TEXT}:1", learning_rate=3e-4, held_out=0.3)
    outcome = run_cli("heal", pruned, "-o", tmp_path / "out", *mixed, "--json")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)["record"]
    assert record["data"] == f"self:3 {TEXT}"
    assert (record["sequences"], record["held_out"]) == (16, 5)
    assert list((tmp_path / "cache").rglob("*.jsonl"))
