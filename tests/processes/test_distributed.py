"""Many processes give what one gives, and fail together. The processes are real ones, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_sets import padded_set, plain_set
from checkpoints import QUICK, run_cli, save_tiny
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from many_processes import in_processes
from tiny_models import Tiny, tiny_model

from sglp_llm import analyze, current_processes, prune
from sglp_llm.calibration import CalibrationSet
from sglp_llm.criteria import GreedyCriterion, SetCriterion, criterion_names, get_criterion, make_criterion
from sglp_llm.engine import Batch, Need, Observer, PassSettings, run_pass
from sglp_llm.errors import UserError
from sglp_llm.models.loading import wrap_model
from sglp_llm.plan import load_plan
from sglp_llm.processes import ALONE, Processes
from sglp_llm.trials import Trials

SETS = {
    "fewer than a minibatch": plain_set(7),
    "an odd number": plain_set(13),
    "padded, one fewer than processes": padded_set(2, "right"),
}
SCORES = ("gradnorm", "taylor", "snip", "gate", "fisher", "bi", "ppl", "sememe", "gradnorm_without")
CHOICES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("angular", {}),
    ("angular", {"tokens": "all"}),
    *(("slp", {"metric": metric}) for metric in ("cosine", "euclidean", "cka")),
    ("slp", {"metric": "cka", "sequences": 2}),
    ("lorp", {}),
)
COSTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sleb", {}),
    ("kl", {}),
    ("cka_output", {}),
    ("cka_output", {"sequences": 3}),
)
SEARCHES: tuple[tuple[str, dict[str, Any]], ...] = (("search", {}),)


def verdicts(calibration: CalibrationSet) -> dict[str, Any]:
    """Every number and choice that depends on the sequences, from all the processes that there are."""
    processes = current_processes()
    model = wrap_model(tiny_model(Tiny("llama", 0)))
    depth = model.num_layers
    settings: dict[str, Any] = {"criterion": "sglp", "also": SCORES[1:], "drop": 2, "minibatch_sequences": 4}
    analysis = analyze(model.model, calibration=calibration, processes=processes, **settings)
    assert analysis.similarity is not None
    found: dict[str, Any] = {
        **analysis.plan.scores,
        "removed": analysis.plan.removed,
        "similarity": analysis.similarity.values.flatten().tolist(),
        "loss": analysis.calibration_loss,
    }
    for name, options in CHOICES:
        criterion = make_criterion(name, depth, options=options)
        assert isinstance(criterion, SetCriterion)
        run_pass(model, calibration, [criterion], PassSettings(batch_size=3, processes=processes))
        most = depth - 2 if name == "lorp" else depth - 1
        found |= {f"{name} {options} {n}": criterion.choose(n, range(depth)) for n in range(1, most + 1)}
    for name, options in COSTS:
        criterion = make_criterion(name, depth, options=options)
        assert isinstance(criterion, GreedyCriterion)
        criterion.on_trials(Trials(model, calibration, processes=processes))
        for removed in ((), (4, 1)):
            candidates = [layer for layer in range(depth) if layer not in removed]
            found[f"{name} {options} {removed}"] = criterion.costs(removed, candidates)
        found[f"{name} {options}"] = criterion.choose(3, range(depth))
    for name, options in SEARCHES:
        criterion = make_criterion(name, depth, options=options)
        assert isinstance(criterion, SetCriterion)
        criterion.on_trials(Trials(model, calibration, processes=processes))
        found[f"{name} {options}"] = criterion.choose(2, range(depth))
        report = criterion.report()
        found[f"{name} {options} costs"] = [cost for race in report["races"] for _, cost in race["costs"]]
        found[f"{name} {options} tokens"] = report["tokens"]
    return found


def all_verdicts(names: list[str]) -> list[dict[str, Any]]:
    return [verdicts(SETS[name]) for name in names]


@pytest.mark.parametrize(
    ("count", "names"),
    [(2, ["fewer than a minibatch"]), pytest.param(3, [*SETS], marks=pytest.mark.slow)],
    ids=["two", "three"],
)
def test_every_number_is_that_of_one_process(count: int, names: list[str], tmp_path: Path) -> None:
    expected = all_verdicts(names)
    for result in in_processes(count, tmp_path, all_verdicts, names):
        assert not isinstance(result, Exception), result
        for found, alone in zip(result, expected, strict=True):
            assert found.keys() == alone.keys()
            for key in alone:
                assert found[key] == pytest.approx(alone[key], rel=1e-6), key


def test_every_criterion_that_looks_at_sequences_is_compared() -> None:
    looking = {name for name in criterion_names() if get_criterion(name).needs & ~(Need.WEIGHTS | Need.SYNAPTIC_FLOW)}
    assert looking == {*SCORES, *(name for name, _ in (*CHOICES, *COSTS, *SEARCHES))}


def searched(folders: list[Path], budget: int | str) -> Any:
    processes = current_processes()
    report = analyze(
        tiny_model(Tiny("llama", 0)),
        calibration=plain_set(5),
        criterion="search",
        options={"search": {"budget": budget}},
        journal=str(folders[processes.index % len(folders)]),
        drop=2,
        processes=processes,
    )
    return report.plan.removed


def test_processes_go_on_from_the_journal_of_the_main_one(tmp_path: Path) -> None:
    shared, apart = [tmp_path / "shared"], [tmp_path / "main", tmp_path / "other"]
    expected = searched(shared, "1000k")
    assert in_processes(2, tmp_path, searched, shared, "1000k") == [expected] * 2
    # As on hosts that share no disk: nothing but the main process's folder is filled, and read.
    for _ in range(2):
        assert in_processes(2, tmp_path, searched, apart, "1000k") == [expected] * 2
    assert len([*apart[0].rglob("*.json")]) > len([*apart[1].rglob("*.json")]) == 1


def test_the_clock_of_the_main_process_ends_the_search(tmp_path: Path) -> None:
    (main, other) = in_processes(2, tmp_path, searched, [tmp_path / "kept"], "0.05s")
    assert main == other
    assert len(main) == 2


class Broken(Observer):
    """Fails in one process, at the first sequence that it sees."""

    needs = Need.HIDDEN_STATES

    def __init__(self, processes: Processes, index: int, error: BaseException | None) -> None:
        self._error, self._is_here = error, processes.index == index

    def on_layer(self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        if self._is_here:
            if self._error is None:
                os._exit(9)
            raise self._error


def broken_pass(index: int, error: BaseException | None) -> str:
    processes = current_processes()
    model = wrap_model(tiny_model(Tiny("llama", 0)))
    observers = [make_criterion("gradnorm", model.num_layers), Broken(processes, index, error)]
    with processes.failing_together():
        run_pass(model, plain_set(6), observers, PassSettings(processes=processes))
    return "done"


def test_the_error_of_one_process_ends_all(tmp_path: Path) -> None:
    found = in_processes(3, tmp_path, broken_pass, 2, UserError("sequence 5 is broken"))
    assert all(isinstance(error, UserError) for error in found)
    told = "process 2: sequence 5 is broken"
    assert [str(error) for error in found] == [told, told, "sequence 5 is broken"]


def test_an_error_that_nobody_expected_ends_all(tmp_path: Path) -> None:
    main, other = in_processes(2, tmp_path, broken_pass, 1, ZeroDivisionError("of something"))
    assert isinstance(main, UserError)
    assert str(main) == "process 1: ZeroDivisionError: of something"
    assert isinstance(other, ZeroDivisionError)


def test_a_killed_process_ends_all(tmp_path: Path) -> None:
    main, other = in_processes(2, tmp_path, broken_pass, 1, None)
    assert other is None
    assert isinstance(main, UserError)
    assert "gone without a word" in str(main)


def with_sets_of_their_own() -> None:
    processes = current_processes()
    calibration = replace(plain_set(4), hash=f"of the file on host {processes.index}")
    analyze(tiny_model(Tiny("llama", 0)), calibration=calibration, drop=1, processes=processes)


def too_few_tokens() -> None:
    # The last minibatch, of one sequence and three tokens, is that of one process.
    model, calibration = tiny_model(Tiny("llama", 0)), plain_set(9, tokens=3)
    analyze(model, criterion="sglp", calibration=calibration, drop=1, processes=current_processes())


def spread_by_accelerate() -> None:
    model = tiny_model(Tiny("llama", 0))
    analyze(model, calibration=plain_set(4), drop=1, device_map="auto", processes=current_processes())


def mistakes() -> list[str]:
    messages = []
    for mistake in (with_sets_of_their_own, too_few_tokens, spread_by_accelerate):
        with pytest.raises(UserError) as caught:
            mistake()
        messages.append(str(caught.value))
    return messages


def test_mistakes_are_everybodys(tmp_path: Path) -> None:
    too_few = "CKA needs at least 4 tokens a minibatch, not 3: use longer sequences"
    main, other = in_processes(2, tmp_path, mistakes)
    assert [main[0], other[0]] == [
        "process 1 has another calibration set than process 0: give all hosts the same files"
    ] * 2
    assert [main[1], other[1]] == [f"process 1: {too_few}", too_few]
    assert main[2] == other[2]
    assert "each of 2 processes needs its own" in main[2]


def prune_to(source: Path, output: Path) -> Any:
    report = prune(
        source, output, calibration="pydoc", samples=3, seq_len=16, drop=2, verify=False, processes=current_processes()
    )
    return report.plan.removed, report.bytes_written, report.verification, [*report.seconds]


def test_one_process_writes(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    alone = prune_to(source, tmp_path / "alone")
    main, other = in_processes(2, tmp_path, prune_to, source, tmp_path / "out")
    assert main == alone
    assert other == (alone[0], 0, None, ["analysis"])
    assert (
        load_plan(tmp_path / "out" / "sglp_plan.json").scores == load_plan(tmp_path / "alone" / "sglp_plan.json").scores
    )


class Share(Processes):
    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count


@given(st.integers(1, 20), st.integers(0, 200), st.integers(1, 20))
def test_shares_are_a_partition_that_cuts_no_group(count: int, sequences: int, together: int) -> None:
    shares = [Share(index, count).share(sequences, together) for index in range(count)]
    assert [sequence for share in shares for sequence in share] == list(range(sequences))
    assert all(share.start % together == 0 for share in shares if share)
    groups = [-(-len(share) // together) for share in shares]
    assert max(groups) - min(groups) <= 1
    assert groups[0] == max(groups)
    assert all(one.stop == other.start for one, other in pairwise([share for share in shares if share]))


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # as clusters set it
    monkeypatch.delenv("RANK", raising=False)
    assert current_processes() is ALONE
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert current_processes() is ALONE


@pytest.mark.parametrize("verb", ["compare", "eval", "bench", "ls"])
@pytest.mark.parametrize("rank", [0, 1])
def test_other_verbs_run_in_one_process(verb: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    outcome = run_cli(verb, "criteria")
    assert (outcome.code, outcome.out) == (2, "")
    if rank == 0:
        assert outcome.error.startswith(f"{verb} runs in one process, and a launcher started 2: ")
    else:
        assert outcome.err == ""


def launched(*arguments: object) -> subprocess.CompletedProcess[str]:
    """``torchrun --nproc-per-node 2 -m sglp_llm ARGUMENTS``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sglp_llm"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_torchrun_prints_and_writes_once(engine: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    options = (*QUICK, "--drop", "2", "--engine", engine, "--also", "taylor", "--also", "ppl")
    assert run_cli("prune", source, "-o", tmp_path / "alone", *options).code == 0
    result = launched("prune", source, "-o", tmp_path / "out", *options)
    assert result.returncode == 0, result
    for line in ("Removed  ", "Reload check  ", "Written  "):
        assert result.stdout.count(line) == 1, result.stdout
    assert "Warning" not in result.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "alone").iterdir()
    }


@pytest.mark.slow
def test_torchrun_says_once_what_one_process_did_wrong(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    options = ("--preset", "paper", "--calibration", "pydoc", "--samples", "9", "--seq-len", "3", "--drop", "2")
    result = launched("prune", source, "-o", tmp_path / "out", *options)
    assert result.returncode != 0
    assert result.stdout == ""
    assert result.stderr.count("sglp-llm: error: ") == 1, result.stderr
    assert "sglp-llm: error: process 1: CKA needs at least 4 tokens" in result.stderr
    assert not (tmp_path / "out").exists()
