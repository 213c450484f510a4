"""The verbs at work: what they print, what they write, and what is left when they are interrupted."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import PLAN, QUICK, Outcome, copied, logits, run_cli, save_tiny, written
from helpers import ROOT
from safetensors.torch import load_file, save_file

from sglp_llm.plan import load_recipe
from sglp_llm.plan.plans import KEYS

PLAN_KEYS = {"schema_version", "source", "revision", "num_layers", "kept", "removed", "segments", "scores"}
PLAN_KEYS |= {"similarity", "footprint", "budget", "settings", "versions"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``sglp-llm ARGUMENTS`` in a process of its own."""
    command = [sys.executable, "-m", "sglp_llm", *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_analyze_prints_every_layer_and_writes_nothing(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run_cli("analyze", tiny, *QUICK, "--also", "bi", "--also", "magnitude", "--drop", 2)
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert lines[1].split() == ["layer", "segment", "CKA", "sum", "gradnorm", "bi", "magnitude"]
    assert [line.split()[0] for line in lines[2:8]] == list("012345")
    assert [line.split()[-1] for line in lines[2:8]].count("removed") == 2
    assert "Removed           2 of 6 layers: " in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_analyze_json_is_one_object_and_progress_goes_to_stderr(tiny: Path) -> None:
    outcome = run_cli("analyze", tiny, *QUICK, "--json")
    analysis = json.loads(outcome.out)
    assert set(analysis) == {"plan", "calibration_loss", "params_before", "params_after", "memory"}
    assert set(analysis["plan"]) == PLAN_KEYS
    assert analysis["plan"]["similarity"]["kernel"] == "cosine"
    assert torch.tensor(analysis["plan"]["similarity"]["values"]).shape == (6, 6)
    assert analysis["plan"]["budget"] == {"ratio": 0.25}
    assert len(analysis["plan"]["removed"]) == 2
    forecast, progress = outcome.err.splitlines()
    assert forecast.startswith("Memory: about ")
    assert progress.startswith("Analysing")


def test_plan_of_an_analysis_exports_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    options = (*QUICK, "--drop", 2, "--max-shard-size", "60KB")
    assert run_cli("analyze", tiny, "-o", tmp_path / "plan", *options[:-2]).code == 0
    plan = json.loads((tmp_path / "plan" / "sglp_plan.json").read_text())
    assert set(KEYS) == set(plan) == PLAN_KEYS
    assert plan["source"]["name"] == str(tiny)
    assert sorted(contents(tmp_path / "plan")) == [
        "cka.png",
        "report.html",
        "scores.png",
        "sglp_plan.json",
        "sglp_recipe.yaml",
    ]

    assert run_cli("prune", tiny, "-o", tmp_path / "direct", *options).code == 0
    file = tmp_path / "plan" / "sglp_plan.json"
    assert run_cli("prune", tiny, "-o", tmp_path / "planned", "--plan", file, *options[-2:]).code == 0
    direct, planned = contents(tmp_path / "direct"), contents(tmp_path / "planned")
    for files in (direct, planned):
        files.pop("sglp_recipe.yaml")
    assert direct == planned
    assert "model-00001-of-00004.safetensors" in direct
    assert torch.equal(logits(tmp_path / "direct"), logits(tiny, skip=tuple(plan["removed"])))


def test_prune_text_and_files(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "parents" / "out"
    outcome = run_cli("prune", tiny, "-o", output, *QUICK, "--drop", 1, "--criterion", "reverse")
    assert outcome.code == 0, outcome
    assert "Removed           1 of 6 layers: 5\n" in outcome.out
    assert "logit vectors equal in float32; generation with and without KV cache agrees" in outcome.out
    assert f"Written           {output} (" in outcome.out
    files = contents(output)
    assert {"config.json", "model.safetensors", "tokenizer.json", "sglp_plan.json", "sglp_recipe.yaml"} <= set(files)
    card = files["README.md"].decode()
    assert "- Removed layers (0-based, of the original): 5\n" in card
    assert str(tiny.parent) not in card
    recipe = load_recipe(output / "sglp_recipe.yaml")
    assert (recipe.model, recipe.drop, recipe.criterion) == (str(tiny), 1, "reverse")


def test_prune_json(tiny: Path, tmp_path: Path) -> None:
    outcome = run_cli("prune", tiny, "-o", tmp_path / "out", *QUICK, "--drop", 1, "--json")
    report = json.loads(outcome.out)
    assert set(report) == {"output", "plan", "bytes_written", "verification", "seconds", "notes", "analysis", "memory"}
    assert set(report["verification"]) == {"dtype", "max_difference", "tolerance", "tokens", "generation"}
    assert report["verification"]["max_difference"] == 0
    assert report["bytes_written"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert set(report["plan"]) == PLAN_KEYS
    assert set(report["seconds"]) == {"analysis", "export", "reload check"}


def test_recipe_with_the_model_in_it_and_its_own_output_again(tiny: Path, tmp_path: Path) -> None:
    written("r.yaml", f"model: {tiny}\ndrop: 2\ncriterion: bi\ncalibration: pydoc\nsamples: 4\nseq_len: 16\n")(tmp_path)
    assert run_cli("prune", "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "out").code == 0
    again = run_cli("prune", "--recipe", tmp_path / "out" / "sglp_recipe.yaml", "-o", tmp_path / "again")
    assert again.code == 0, again
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    changed = run_cli(
        "prune", "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "more", "--ratio", "0.5", "--no-verify"
    )
    assert "Removed           3 of 6 layers: " in changed.out


def test_a_preset_over_a_recipe_under_the_options(tiny: Path, tmp_path: Path) -> None:
    written("r.yaml", f"model: {tiny}\ndrop: 2\ncriterion: bi\ncalibration: pydoc\nsamples: 4\nseq_len: 16\n")(tmp_path)
    options = ("--search-budget", "5m", "--option", "search.proposals=4", "--compensate", "scale")
    where = ("-o", tmp_path / "out", "--journal", tmp_path / "kept")
    outcome = run_cli("analyze", "--recipe", tmp_path / "r.yaml", "--preset", "sglp-search", *options, *where)
    assert outcome.code == 0, outcome
    assert "Cost: about 300 s of trials (search), 64 calibration tokens to fit (scale)" in outcome.err.splitlines()
    recipe = load_recipe(tmp_path / "out" / "sglp_recipe.yaml")
    assert (recipe.criterion, recipe.drop, recipe.compensate) == ("search", 2, "scale")
    assert recipe.options == {"search": {"proposals": 4, "budget": "5m"}}
    plan = json.loads((tmp_path / "out" / "sglp_plan.json").read_text())
    first, *_ = plan["compensation"]["candidates"]  # those that were repaired before one was taken
    assert plan["settings"]["search"]["winner"]["removed"] == first["removed"]
    assert not {"journal", "preset"} & set(plan["settings"])
    again = run_cli("analyze", "--recipe", tmp_path / "out" / "sglp_recipe.yaml", "--json")
    assert json.loads(again.out)["plan"]["settings"] == plan["settings"]
    assert "Cost: " not in again.err
    other = run_cli("analyze", "--recipe", tmp_path / "out" / "sglp_recipe.yaml", "--samples", "5")
    assert other.code == 2
    assert (
        f"{tmp_path / 'kept' / 'trials'} holds an unfinished or finished run with another calibration_hash" in other.err
    )


def test_recipe_of_another_model(tiny: Path, tmp_path: Path) -> None:
    written("r.yaml", "model: owner/name\nrevision: v1\ndrop: 2\n")(tmp_path)
    outcome = run_cli("prune", tiny, "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "out", *QUICK, "--no-verify")
    assert outcome.code == 0, outcome
    recipe = load_recipe(tmp_path / "out" / "sglp_recipe.yaml")
    assert (recipe.model, recipe.revision, recipe.drop) == (str(tiny), None, 2)


def test_no_verify(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    bare = copied(tiny, tmp_path / "bare", lambda folder: [(folder / name).unlink() for name in TOKENIZER])
    outcome = run_cli("prune", bare, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json", "--no-verify")
    assert outcome.code == 0, outcome  # a plan that is not checked needs no tokenizer
    assert "Reload check      switched off" in outcome.out
    assert torch.equal(logits(tmp_path / "out"), logits(tiny, skip=(2, 4)))


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def test_plan_for_a_model_with_few_positions(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    source = save_tiny(tmp_path / "source", "gpt2", n_positions=40)
    outcome = run_cli("prune", source, "-o", tmp_path / "out", "--plan", tmp_path / "plan.json", "--json")
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["verification"]["tokens"] == 2 * 40


def test_overwrite(tiny: Path, tmp_path: Path) -> None:
    for removed, overwrite in ((1, ()), (2, ("--overwrite",))):
        options = ("--criterion", "reverse", "--drop", removed, "--no-verify", *overwrite)
        assert run_cli("prune", tiny, "-o", tmp_path / "out", *QUICK, *options).code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_target_params_removes_the_fewest(tiny: Path) -> None:
    counts = {}
    for target in ("60K", "59,232", "59_231"):
        analysis = json.loads(run_cli("analyze", tiny, *QUICK, "--target-params", target, "--json").out)
        counts[target] = (len(analysis["plan"]["removed"]), analysis["params_after"])
    assert counts == {"60K": (1, 59232), "59,232": (1, 59232), "59_231": (2, 51488)}


def test_eval(tiny: Path) -> None:
    options = ("--data", "pydoc", "--window", 32, "--max-windows", 3)
    result = json.loads(run_cli("eval", tiny, *options, "--json").out)
    assert (result["model"], result["dataset"], result["windows"], result["tokens"]) == (str(tiny), "pydoc:test", 3, 93)
    text = run_cli("eval", tiny, *options, "--batch-size", 2).out
    assert "Windows     3 x 32 tokens, with BOS, not overlapping" in text
    assert f"Perplexity  {result['perplexity']:.3f} ± " in text


@pytest.mark.parametrize(
    ("what", "member"),
    [
        ("adapters", "llama"),
        ("criteria", "sglp"),
        ("compensations", "linear"),
        ("presets", "sglp-search"),
        ("recipes", "opt-125m"),
    ],
)
def test_ls(what: str, member: str) -> None:
    rows = json.loads(run_cli("ls", what, "--json").out)[what]
    assert member in [next(iter(row.values())) for row in rows]
    assert member in run_cli("ls", what).out


@pytest.mark.parametrize("verb", [(), ("analyze",), ("prune",), ("eval",), ("ls",)])
def test_help(verb: tuple[str, ...]) -> None:
    outcome = run_cli(*verb, "--help")
    assert outcome.code == 0
    assert "Usage: sglp-llm" in outcome.out
    assert outcome.err == ""


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["--version"], ["prune"]])
def test_help_and_slips_load_no_tensor_library(arguments: list[str]) -> None:
    code = (
        "import sys; from sglp_llm.cli.main import _run; sys.argv = ['sglp-llm', *sys.argv[1:]]; _run(); "
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-1] == "set()"


def test_interrupted_while_writing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "copy_file_range", interrupt)
    outcome = run_cli("prune", tiny, "-o", tmp_path / "new" / "out", *QUICK, "--drop", 1)
    assert (outcome.code, outcome.err.splitlines()[-1]) == (130, "sglp-llm: error: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_a_librarys_pool_ends_its_workers_silently() -> None:
    """lm-eval's standard errors come from a pool of processes, which has this process's handlers of signals."""
    code = """
import multiprocessing, time
from sglp_llm.cli import main as entry

def run():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(abs, range(4))
        time.sleep(0.2)  # until they wait for work
    return 0

entry._run = run
entry.main()
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("overwrite", [False, True])
def test_full_disk(overwrite: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    output = tmp_path / "out"
    if overwrite:
        copied(tiny, output)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    copy = os.copy_file_range
    calls: list[int] = []

    def fill(*arguments: Any, **options: Any) -> int:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copy(*arguments, **options)

    monkeypatch.setattr(os, "copy_file_range", fill)
    options = ["--overwrite"] if overwrite else []
    outcome = run_cli("prune", tiny, "-o", output, "--plan", tmp_path / "plan.json", *options)
    assert outcome.code == 2, outcome
    assert f"{output}: cannot be written: No space left on device" in outcome.error
    assert len(calls) > 1
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_a_real_process_says_one_line(tiny: Path, tmp_path: Path) -> None:
    nan = copied(tiny, tmp_path / "nan")
    damaged = {name: tensor * float("nan") for name, tensor in load_file(nan / "model.safetensors").items()}
    save_file(damaged, nan / "model.safetensors", metadata={"format": "pt"})
    ended = process("prune", nan, "-o", tmp_path / "new" / "out", "--drop", 1, *QUICK)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "holds numbers that are not finite" in Outcome(ended.returncode, ended.stdout, ended.stderr).error
    assert not (tmp_path / "new").exists()


def test_a_real_process_prints_only_json_on_stdout(tiny: Path, tmp_path: Path) -> None:
    ended = process("prune", tiny, "-o", tmp_path / "out", "--drop", 1, "--json", *QUICK)
    assert ended.returncode == 0, ended
    assert json.loads(ended.stdout)["output"] == str(tmp_path / "out")
    assert [line.split()[0] for line in ended.stderr.splitlines()] == ["Memory:", "Analysing", "Writing"]


def test_a_terminal_that_knows_only_ascii(tiny: Path) -> None:
    options = ("--data", "pydoc", "--window", 32, "--max-windows", 2)
    ended = process("eval", tiny, *options, PYTHONIOENCODING="ascii")
    assert ended.returncode == 0, ended
    assert " ? " in ended.stdout.splitlines()[-1]


def test_a_reader_that_has_seen_enough() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sglp_llm", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "")
