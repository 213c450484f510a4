"""What vLLM's loader and configuration checks want of a shortened checkpoint, by its sources; vLLM itself is not run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from checkpoints import SMALL, run_cli, save_tiny
from gguf_files import write_gguf
from safetensors import safe_open

LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")

_WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 6}


def names_of(folder: Path) -> list[str]:
    """What vLLM loads: the files that the index names, or without one every ``*.safetensors`` of the folder."""
    files, index = sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text())["weight_map"].values())
        assert named == {file.name for file in files}  # it would leave others out, and fail on missing ones
    names = []
    for file in files:
        with safe_open(file, "pt") as opened:
            names += list(opened.keys())
    assert len(names) == len(set(names))
    return names


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("qwen2", _WINDOWED),
        ("qwen3", {"head_dim": 16}),
        ("gemma3_text", {}),
        ("mixtral", {}),
        ("gpt2", {}),
    ],
)
def test_loader_and_configuration(model_type: str, changes: dict[str, object], tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", model_type, **changes)
    output = tmp_path / "out"
    outcome = run_cli("prune", source, "--plan", "1,4", "-o", output, "--no-verify", "--max-shard-size", "40KB")
    assert outcome.code == 0, outcome
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, output))
    depth_key = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    depth = before[depth_key] - 2
    assert after[depth_key] == depth
    # A name for which the model has no parameter, such as one of a removed layer, ends the loading.
    assert {int(found[1]) for name in names_of(output) if (found := LAYER.search(name))} == set(range(depth))
    # The class is looked up by name; everything else that the memory and the draft model are planned by is the original's.
    for key in ("architectures", "vocab_size", "max_position_embeddings", "dtype", "tie_word_embeddings", "head_dim"):
        assert after.get(key) == before.get(key), key
    # Each layer looks its kind up in the list by its own index.
    for key in ("layer_types", "no_rope_layers"):
        assert len(after.get(key) or range(depth)) == depth
    # Qwen2: layers of two kinds only where this is the depth.
    if "max_window_layers" in changes:
        assert after["max_window_layers"] == depth
    for file in source.glob("tokenizer*"):
        assert (output / file.name).read_bytes() == file.read_bytes()


def test_without_an_index_no_other_file_is_taken_for_weights(tmp_path: Path) -> None:
    source, output = save_tiny(tmp_path / "tiny"), tmp_path / "out"
    options = ("--criterion", "reverse", "--drop", 2, "--compensate", "linear", *SMALL)
    outcome = run_cli("prune", source, *options, "-o", output, "--no-verify")
    assert outcome.code == 0, outcome
    assert [file.name for file in output.glob("*.safetensors")] == ["model.safetensors"]
    assert "replaced" in json.loads((output / "sglp_plan.json").read_text())
    assert not list(output.glob("*.bin")) + list(output.glob("*.pt"))
    assert all(name.startswith(("model.", "lm_head.")) for name in names_of(output))


def test_draft_model(tmp_path: Path) -> None:
    source, output = save_tiny(tmp_path / "tiny"), tmp_path / "out"
    assert run_cli("prune", source, "--plan", "1", "-o", output, "--no-verify").code == 0
    outcome = run_cli("export", output, "--to", "vllm-draft", "--json")
    assert outcome.code == 0, outcome
    found = json.loads(outcome.out)
    config = json.loads((output / "vllm_speculative.json").read_text())
    assert config == {"method": "draft_model", "model": str(output), "num_speculative_tokens": 5}
    *command, given = shlex.split(found["next_command"])
    assert command == ["vllm", "serve", str(source), "--speculative-config"]
    assert json.loads(given) == config
    assert f"sglp-llm bench {output} --draft-for {source}" in found["notes"][0]
    assert "already exists" in run_cli("export", output, "--to", "vllm-draft").error
    gguf = write_gguf(tmp_path / "tiny.gguf")
    assert run_cli("prune", gguf, "--plan", "1", "-o", tmp_path / "from_gguf", "--no-verify").code == 0
    assert "is a GGUF file" in run_cli("export", tmp_path / "from_gguf", "--to", "vllm-draft").error
