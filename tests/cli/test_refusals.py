"""The user's mistakes on the command line: exit code 2, one line that says what would be right, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import PLAN, QUICK, SMALL, copied, run_cli, save_tiny, written


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that arguments below name in braces."""
    folder = tmp_path_factory.mktemp("files")
    contents = {
        "short": b"Too little to say.",
        "empty": b"",
        "latin1": b"caf\xe9 " * 500,
        "rows": b'{"title": "a"}\n',
        "plan": json.dumps(PLAN).encode(),
        "cut_plan": b'{"num_layers": 6, "kept": [0',
        "list_plan": b"[1, 2]",
        "deep_plan": b'{"num_layers": 8, "removed": [7]}',
        "wild_plan": b'{"num_layers": 6, "removed": [6]}',
        "misspelt_plan": b'{"num_layers": 6, "remvoed": [1]}',
        "misspelt.yaml": b"rattio: 0.5\n",
        "typed.yaml": b"ratio: half\n",
        "broken.yaml": b"ratio: [0.5\n",
        "list.yaml": b"- 1\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


BUDGETS = [
    ("--ratio 0", "between 0 and 1"),
    ("--ratio 1", "between 0 and 1"),
    ("--ratio -0.1", "between 0 and 1"),
    ("--ratio nan", "between 0 and 1"),
    ("--ratio inf", "between 0 and 1"),
    ("--ratio 0.01", "removes no layer; at most 5 can go"),
    ("--ratio half", "--ratio"),
    ("--drop 6", "at most 5 can go"),
    ("--drop 0", "removes no layer; at most 5 can go"),
    ("--drop -1", "at most 5 can go"),
    ("--drop 1.5", "--drop"),
    ("--drop 4 --protect-first 2 --protect-last 1", "at most 3 can go"),
    ("--drop 1 --protect-first -1", "must not be negative"),
    ("--drop 1 --ratio 0.5", "exactly one of ratio, drop, target_params, target_memory and target_latency"),
    ("--drop 1 --target-params 1M", "exactly one of ratio, drop, target_params, target_memory and target_latency"),
    ("", "how much to remove?"),
    ("--target-params huge", "a number such as 100M or 6.5B"),
    ("--target-params 0", "a number such as 100M or 6.5B"),
    ("--drop 1 --num-segments 6", "at most 0 can go (one a segment"),
]

SETTINGS = [
    ("--criterion gradnrm", "did you mean 'gradnorm'?"),
    ("--also magnitud", "did you mean 'magnitude'?"),
    ("--calibration wikitext", "did you mean 'wikitext2'?"),
    ("--calibration wikitext2:dev", "Known: test, train"),
    (
        "--calibration text:{short}",
        "the text has 13 tokens, but 4 sequences of 16 need 60; lower samples or seq_len",
    ),
    ("--calibration text:{empty}", "the file is empty"),
    ("--calibration text:{latin1}", "not UTF-8 text: byte 0xe9 at offset 3"),
    ("--calibration text:/nowhere/text", "/nowhere/text: there is no such file"),
    ("--calibration jsonl:{rows}:text", "there is no field 'text'; the fields are 'title'"),
    ("--calibration jsonl:{rows}", "write jsonl:FILE:FIELD"),
    ("--seq-len 129", "seq_len 129 is longer than the 128 positions"),
    ("--seq-len 1", "seq_len must be at least 2"),
    ("--samples 0", "samples must be at least 1"),
    ("--batch-size 0", "batch_size must be at least 1"),
    ("--kernel rbf", "kernel must be cosine or linear"),
    ("--criterion angular --segments", "angular gives a set of layers, not scores: it cannot be used inside segments"),
    (
        "--criterion angular --option angular.token=all",
        "unknown option of the criterion angular 'token'; did you mean 'tokens'?",
    ),
    ("--criterion angular --option angular.tokens=al", "unknown tokens of angular 'al'; did you mean 'all'?"),
    ("--criterion slp --option slp.metric=l2", "unknown metric of slp 'l2'"),
    ("--option gradnorm.norm=layers", "unknown norm of gradnorm 'layers'; did you mean 'layer'?"),
    ("--criterion gate --option gate.order=3", "order of gate is 1 or 2, not 3"),
    ("--criterion bi --option slp.metric=cka", "options: slp is not among the criteria of this run (bi)"),
    ("--criterion bi --option bi.x=1", "option of the criterion bi 'x'"),
    ("--option angular", "is not of the form CRITERION.KEY=VALUE"),
    ("--kernel cosin", "cosine or linear, not 'cosin'"),
    ("--num-segments 0", "num_segments must be at least 1"),
    ("--num-segments -1", "num_segments must be at least 1"),
    ("--num-segments 99", "99 segments are more than the model's 6 decoder layers"),
    ("--num-segments abc", "a whole number or auto, not 'abc'"),
    ("--num-segments ²", "a whole number or auto, not '²'"),
    ("--dtype int8", "auto or bfloat16 or float16 or float32"),
    ("--device-map mars", "mars"),
    ("--max-shard-size nonsense", "a size such as 500MB"),
    ("--max-shard-size 0", "a size such as 500MB"),
    ("--max-shard-size -1GB", "a size such as 500MB"),
    ("--push-to-hub a/b/c", "the Hub repository: Repo id must be"),
    ("--push-to-hub a..b", "the Hub repository: "),
    ("--private", "give --push-to-hub REPO too"),
    ("--revision main", "a revision is for models on the Hub"),
    ("--recipe smollm", "did you mean 'smollm2-135m'?"),
    ("--recipe /nowhere/recipe.yaml", "there is no such recipe"),
    ("--recipe {misspelt.yaml}", "did you mean 'ratio'?"),
    ("--recipe {typed.yaml}", "ratio must be a number, not 'half'"),
    ("--recipe {broken.yaml}", "not a YAML file"),
    ("--recipe {list.yaml}", "expected 'key: value' lines"),
    ("--preset sglp-serch", "unknown preset 'sglp-serch'; did you mean 'sglp-search'?"),
    (
        "--preset sglp --search-budget 5m",
        "options: search is not among the criteria of this run (gradnorm)",
    ),
    ("--criterion bi --option search.budget=1", "options: search is not among the criteria of this run (bi)"),
    ("--criterion search --search-budget 16x", "budget of search must be tokens (16000, 16k) or a time (30s, 5m, 2h)"),
    ("--preset sglp-search --search-budget 0", "budget of search must be tokens"),
    ("--criterion search --option search.held_out=1.5", "held_out of search must be a number between 0 and 1, not 1.5"),
    ("--criterion bi --journal kept", "journal keeps the trials of search; this run has bi: leave it out"),
    ("--num-segments 3 --segments-rule paper", "segments_rule finds the number of segments, and num_segments gives it"),
    ("--segments-rule ours", "segments_rule must be auto or paper, not 'ours'"),
    ("--preset sglp-search --segments", "search gives a set of layers, not scores"),
    ("--nonsense", "No such option: --nonsense"),
]

PLANS = [
    ("--plan {plan} --ratio 0.5", "leave out --ratio"),
    ("--plan {plan} --target-params 1M", "leave out --target-params"),
    ("--plan {plan} --criterion bi", "leave out --criterion"),
    ("--plan {plan} --preset best", "leave out --preset"),
    ("--plan {plan} --search-budget 5m", "leave out --search-budget"),
    ("--plan {plan} --num-segments 3", "leave out --num-segments"),
    ("--plan {plan} --protect-first 1", "leave out --protect-first"),
    ("--plan /nowhere/plan.json", "there is no such plan file"),
    ("--plan {cut_plan}", "not a JSON file"),
    ("--plan {list_plan}", "must be a JSON object, not list"),
    ("--plan {wild_plan}", "layer 6 is not in 0..5"),
    ("--plan {misspelt_plan}", "did you mean 'removed'?"),
    ("--plan {deep_plan}", "for a model of 8 decoder layers"),
    ("--plan {plan} --calibration nope", "unknown calibration set 'nope'"),
]


@pytest.mark.parametrize(
    ("options", "message"), [*BUDGETS, *((f"--drop 1 {options}", text) for options, text in SETTINGS), *PLANS]
)
def test_refused(options: str, message: str, tiny: Path, odd_files: dict[str, Path], tmp_path: Path) -> None:
    for name, path in odd_files.items():
        options = options.replace(f"{{{name}}}", str(path))
    default = SMALL if "--plan" in options else QUICK
    outcome = run_cli("prune", tiny, "-o", tmp_path / "new" / "out", *default, *options.split())
    assert outcome.code == 2, outcome
    assert message in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_what_only_the_analysis_can_tell_is_refused_after_it(tiny: Path, tmp_path: Path) -> None:
    outcome = run_cli("prune", tiny, "-o", tmp_path / "new" / "out", *QUICK, "--target-params", "30K")
    assert outcome.code == 2, outcome
    _, progress, error = outcome.err.splitlines()
    assert progress.startswith("Analysing")
    assert error.startswith("sglp-llm: error: target_params 30,000 cannot be reached: with the ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prnue x", "No such command 'prnue'"),
        ("prune", "Give --output FOLDER"),
        ("prune --drop 1 -o new/out", "which model?"),
        ("prune {nothing} --drop 1 -o new/out", "which model?"),
        ("analyze", "which model?"),
        ("eval", "Missing argument 'MODEL'"),
        ("ls", "Missing argument"),
        ("ls criterias", "did you mean 'criteria'?"),
        ("prune ./nowhere --drop 1 -o new/out", "./nowhere: there is no such folder or file"),
        ("prune /nowhere/model.gguf --drop 1 -o new/out", "there is no such folder or file"),
        ("prune a//b --drop 1 -o new/out", "neither a folder, a .gguf file nor the name of a model on the Hub"),
        ("prune {tiny} --drop 1 -o {tiny}/config.json", "is a file; the output is a folder"),
        ("prune {tiny} --drop 1 -o {tiny}/config.json/out", "config.json: it is not a folder"),
        ("eval {tiny} --data nope", "unknown calibration set 'nope'"),
        ("eval {tiny} --data pydoc --window 1", "window is 1"),
        ("eval {tiny} --data pydoc --window 64 --max-windows 0", "max_windows is 0"),
        ("eval {tiny} --data pydoc --window 64 --max-windows 1 --batch-size 0", "batch_size is 0"),
        ("eval {tiny} --data pydoc --window 256 --max-windows 1", "longer than the model's context of 128"),
        ("eval {tiny} --data pydoc --dtype int8", "auto or bfloat16 or float16 or float32"),
    ],
)
def test_refused_without_a_run(
    arguments: str, message: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = ["" if word == "{nothing}" else word.replace("{tiny}", str(tiny)) for word in arguments.split()]
    outcome = run_cli(*filled)
    assert outcome.code == 2, outcome
    assert message in outcome.error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["prune", "analyze"])
@pytest.mark.parametrize("place", ["source", "source/inside", "around", "link", "link/inside"])
def test_the_source_is_never_overwritten(verb: str, place: str, tiny: Path, tmp_path: Path) -> None:
    """``around`` looks like an old output, so that only its being above the source protects it."""
    around = tmp_path / "around"
    around.mkdir()
    written("config.json", "{}")(around)
    source = copied(tiny, around / "source")
    (around / "link").symlink_to(source)
    output = tmp_path if place == "around" else around
    before = {path.name: path.stat().st_mtime_ns for path in source.iterdir()}
    outcome = run_cli(verb, source, "-o", output / place, "--overwrite", "--drop", 1, *QUICK)
    assert outcome.code == 2, outcome
    assert "the output must lie outside the source" in outcome.error
    assert {path.name: path.stat().st_mtime_ns for path in source.iterdir()} == before
    assert sorted(path.name for path in around.iterdir()) == ["config.json", "link", "source"]


@pytest.mark.parametrize("verb", ["prune", "analyze"])
def test_only_what_we_wrote_is_overwritten_and_only_when_asked(verb: str, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "diary.txt").write_text("dear diary")
    for options, message in (((), "already exists"), (("--overwrite",), "--overwrite replaces only these")):
        outcome = run_cli(verb, tiny, "-o", output, "--drop", 1, *QUICK, *options)
        assert outcome.code == 2
        assert message in outcome.error
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "diary.txt"]


def test_a_plan_is_for_one_model_wherever_it_lies(tiny: Path, tmp_path: Path) -> None:
    assert run_cli("analyze", tiny, "-o", tmp_path / "plan", "--drop", 2, *QUICK).code == 0
    other = save_tiny(tmp_path / "other", hidden_size=64)
    outcome = run_cli("prune", other, "-o", tmp_path / "out", "--plan", tmp_path / "plan", "--no-verify")
    assert outcome.code == 2, outcome
    assert "the plan was made for another model" in outcome.error
    assert not (tmp_path / "out").exists()
    copy = copied(tiny, tmp_path / "copy")
    assert run_cli("prune", copy, "-o", tmp_path / "out", "--plan", tmp_path / "plan", "--no-verify").code == 0
