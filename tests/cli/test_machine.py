"""``sglp-llm doctor`` against what the libraries themselves say."""

from __future__ import annotations

import json
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import torch
from checkpoints import run_cli
from command_lines import program
from huggingface_hub import constants
from local_hub import LocalHub
from packaging.requirements import Requirement


def test_what_is_there(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "sglp-llm").mkdir()
    (tmp_path / "sglp-llm" / "kept").write_bytes(b"12345")
    found = json.loads(run_cli("doctor", "--json").out)
    assert found["versions"]["torch"]["version"] == version("torch")
    wanted = next(Requirement(line).specifier for line in requires("sglp-llm") or () if line.startswith("peft"))
    assert found["versions"]["peft"] == {"version": version("peft"), "wanted": f"{wanted} (extra heal)", "fits": True}
    first = found["devices"][0]
    assert (first["device"], first["dtypes"][0]) == ("cpu", "float32")
    assert len(found["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()
    assert found["memory"]["host_free"] > 0
    assert found["caches"]["sglp-llm"]["path"] == str(tmp_path / "sglp-llm")
    assert found["caches"]["sglp-llm"]["bytes"] == 5
    assert found["hub"] == {"endpoint": hub.address, "state": "answers", "token": True}
    assert set(found["missing"]) == set(program().commands) - {"doctor"}
    assert found["missing"]["push"] == found["missing"]["prune"] == []


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("SGLP_EVAL_DATA", raising=False)
    outcome = run_cli("doctor")
    assert outcome.code == 0, outcome
    assert "http://127.0.0.1:9: does not answer; no token" in outcome.out
    assert "hf auth login" in outcome.out
    assert "--data-dir" in outcome.out


def test_a_converter_that_is_there_is_not_missing(
    tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> list[str]:
        lines: list[str] = json.loads(run_cli("doctor", "--json").out)["missing"]["export"]
        return lines

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    without = missing()
    (tmp_path / "convert_hf_to_gguf.py").write_text("")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert without == [line for line in without if line.startswith("--to gguf")] + missing() != missing()
