"""``plan-memory``, and the first and last lines of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import QUICK, Outcome, copied, edited, run_cli, save_tiny, without
from transformers import AutoConfig

from sglp_llm.cli.memory_table import forecast_line
from sglp_llm.memory import EngineMemory, FreeMemory
from sglp_llm.memory.peaks import RUNTIME
from sglp_llm.memory.prediction import predict_memory
from sglp_llm.plan import Recipe, preset_settings


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


def plan_memory_of(*arguments: object) -> tuple[Outcome, dict[str, Any]]:
    outcome = run_cli("plan-memory", *arguments, "--json")
    return outcome, json.loads(outcome.out) if outcome.code == 0 else {}


def test_plan_memory_needs_no_weights(tiny: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny / "config.json").read_bytes())
    outcome, planned = plan_memory_of(bare)
    assert (outcome.code, outcome.err) == (0, "")
    assert planned["engines"] == plan_memory_of(tiny)[1]["engines"]
    assert planned["auto"] == "resident"
    assert set(planned["free"]) == {"host", "device", "disk"}
    expected = predict_memory(
        AutoConfig.from_pretrained(tiny), Recipe().with_changes(**preset_settings("fast"))
    ).resident
    assert planned["engines"]["resident"]["host"] == dict(expected.host)
    assert planned["engines"]["resident"]["host_peak"] == expected.host_peak


def test_plan_memory_prints_a_table(tiny: Path, tmp_path: Path) -> None:
    outcome = run_cli(
        "plan-memory", tiny, "--preset", "paper", "--also", "taylor", "--scratch", tmp_path / "to come", "--samples", 64
    )
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert lines[0].endswith(": sglp, taylor in float32, 64 x 512 tokens")
    assert lines[1].split() == ["resident,", "host", "streamed,", "host"]
    labels = [line.split("  ")[0] for line in lines[2:-1]]
    assert labels[-5:] == ["runtime", "peak", "free now", "scratch on disk", "free on disk"]
    assert lines[-1].startswith("Engine auto takes here: resident (both fit; ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "which model?"),
        ("./nowhere", "./nowhere: there is no such folder or file"),
        ("{tiny} --criterion gradnrm", "did you mean 'gradnorm'?"),
        ("{tiny} --samples 0", "samples must be at least 1"),
        ("{tiny} --dtype int8", "dtype must be auto or bfloat16"),
        ("{tiny} --revision v1", "a revision is for models on the Hub"),
        ("{empty}", "no config.json"),
        ("{odd}", "the memory cannot be predicted: a model of this configuration does not run"),
        ("{unknown}", "unknown model family"),
    ],
)
def test_plan_memory_refuses(options: str, message: str, tiny: Path, tmp_path: Path) -> None:
    folders = {"tiny": tiny, "empty": copied(tiny, tmp_path / "empty", without("config.json"))}
    folders["odd"] = copied(tiny, tmp_path / "odd", edited("config.json", num_key_value_heads=3))
    folders["unknown"] = copied(tiny, tmp_path / "unknown", edited("config.json", model_type="lama"))
    outcome = run_cli("plan-memory", *options.format(**folders).split())
    assert outcome.code == 2, outcome
    assert message in outcome.error


def test_plan_memory_knows_presets(tiny: Path) -> None:
    outcome = run_cli(
        "plan-memory", tiny, "--compensate", "learned", "--criterion", "search", "--samples", 8, "--seq-len", 32
    )
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert lines[0].endswith(": search + learned in float32, 8 x 32 tokens")
    assert any(line.startswith("refined weights ") for line in lines)


def test_of_a_model_on_the_hub_the_configuration_alone_is_fetched(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append((repo, options["revision"], options["allow_patterns"]))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    outcome, _ = plan_memory_of("owner/name", "--revision", "v1")
    assert outcome.code == 0, outcome
    assert asked == [("owner/name", "v1", ["config.json"])]


# The first and the last line of a run


def test_the_forecast_in_words() -> None:
    gigabyte = 10**9
    memory = EngineMemory("resident", {"weights": gigabyte, "runtime": gigabyte // 10}, None, 0)
    free = FreeMemory(14 * gigabyte, 80 * gigabyte)
    assert forecast_line(memory, free) == "Memory: about 1.1 GB predicted (resident engine), 14 GB free"
    both = EngineMemory("streamed", {"weights": gigabyte}, {"weights": 2 * gigabyte}, 3 * gigabyte)
    assert forecast_line(both, free) == (
        "Memory: about 2.0 GB on the device and 1.0 GB on the host and 3.0 GB on disk predicted (streamed engine), "
        "80 GB and 14 GB and unknown free"
    )


def test_a_run_begins_with_the_forecast_and_ends_with_the_peak(tiny: Path, tmp_path: Path) -> None:
    outcome = run_cli("analyze", tiny, *QUICK)
    assert outcome.err.splitlines()[0].startswith("Memory: about ")
    assert outcome.out.splitlines()[-1].startswith("Peak memory       ")
    outcome = run_cli("prune", tiny, "-o", tmp_path / "out", *QUICK, "--drop", 1, "--json")
    memory = json.loads(outcome.out)["memory"]
    assert memory["engine"] == "resident"
    assert memory["predicted_host_bytes"] > RUNTIME
    assert memory["peak_host_bytes"] > 100 * 2**20  # torch alone takes more
    planned = run_cli("prune", tiny, "-o", tmp_path / "again", "--plan", tmp_path / "out" / "sglp_plan.json")
    assert planned.out.splitlines()[-1].startswith("Peak memory       ")
    assert "Memory: about" not in planned.err
