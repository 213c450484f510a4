"""``export --to gguf`` and ``--to ollama``: what the converter demands, what is added to its file, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import edited, logits, logits_of, run_cli, save_tiny, tiny_model
from gguf_files import gguf_model, metadata, write_gguf
from safetensors import safe_open
from transformers import AutoTokenizer

from sglp_llm.errors import UserError
from sglp_llm.models.opened import OpenedModel
from sglp_llm.onwards.gguf import find_converter

SMOL = Path.home() / ".cache" / "sglp-llm" / "SmolLM2-135M-Instruct.Q4_1.gguf"

# Stands for the converter, which is no part of this program: it writes what it is told to.
STAND_IN = """
import shutil, sys
shutil.copy({file!r}, sys.argv[sys.argv.index("--outfile") + 1])
"""


def pruned(folder: Path, removed: str, *options: object) -> Path:
    output = folder.with_name(f"{folder.name}-short")
    outcome = run_cli("prune", folder, "--plan", removed, "-o", output, "--no-verify", *options)
    assert outcome.code == 0, outcome
    return output


def stand_in(clone: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clone.mkdir(exist_ok=True)
    (clone / "convert_hf_to_gguf.py").write_text(script)
    monkeypatch.setenv("LLAMA_CPP", str(clone))


def test_the_converter_demands_that_the_index_names_exactly_what_the_shards_hold(tmp_path: Path) -> None:
    for options in (("--max-shard-size", "50KB"), ()):
        folder = pruned(save_tiny(tmp_path / f"tiny{len(options)}", "mixtral"), "1,4", *options)
        index = folder / "model.safetensors.index.json"
        assert index.is_file() == bool(options)
        if options:
            held = {}
            for shard in folder.glob("*.safetensors"):
                with safe_open(shard, "pt") as file:
                    held |= dict.fromkeys(file.keys(), shard.name)
            assert json.loads(index.read_text())["weight_map"] == held
            assert len(set(held.values())) > 2


def test_where_the_converter_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = pruned(save_tiny(tmp_path / "tiny"), "1")
    for target in ("gguf", "ollama"):
        assert "git clone https://github.com/ggml-org/llama.cpp" in run_cli("export", folder, "--to", target).error
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no convert_hf_to_gguf.py in it"):
        find_converter()
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys; sys.exit('a model of this kind is unknown')")
    assert find_converter() == script
    assert "failed (a model of this kind is unknown)" in run_cli("export", folder, "--to", "gguf").error
    script.write_text("import a_package_that_nobody_has")
    assert "pip install what its requirements/ name" in run_cli("export", folder, "--to", "gguf").error
    monkeypatch.delenv("LLAMA_CPP")
    script.chmod(0o755)
    assert find_converter() == script
    assert not list(folder.glob("*.gguf")) + list(folder.glob(".*"))


def test_layers_with_a_window_are_written_out_after_the_converter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_model("gemma2", sliding_window=4).save_pretrained(tmp_path / "tiny")
    folder = pruned(tmp_path / "tiny", "0,3")
    file = write_gguf(tmp_path / "converted.gguf", "gemma2", removed=(0, 3), sliding_window=4)
    stand_in(tmp_path / "llama.cpp", STAND_IN.format(file=str(file)), monkeypatch)
    outcome = run_cli("export", folder, "--to", "gguf", "--json")
    assert outcome.code == 0, outcome
    notes = json.loads(outcome.out)["notes"]
    assert "derive it from the depth" in notes[0]
    assert "the same next token as the checkpoint at 128 of 128 positions" in notes[1]
    made = metadata(folder / "model.gguf")
    assert made["gemma2.attention.sliding_window_pattern"] == [False, True, True, False]
    plan = json.loads(made["sglp_llm.plan"])
    assert (plan["removed"], plan["source"]["name"]) == ([0, 3], "tiny")
    torch.testing.assert_close(logits_of(OpenedModel(folder / "model.gguf").load().model), logits(folder))
    assert not list(folder.glob(".*"))


def test_a_file_that_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_model().save_pretrained(tmp_path / "tiny")
    folder = pruned(tmp_path / "tiny", "0,3")
    file = write_gguf(tmp_path / "converted.gguf", removed=(1, 3))
    stand_in(tmp_path / "llama.cpp", STAND_IN.format(file=str(file)), monkeypatch)
    outcome = run_cli("export", folder, "--to", "gguf")
    assert outcome.code == 2
    assert "wrote a file that computes something else" in outcome.err.splitlines()[-1]
    assert not list(folder.glob("*.gguf")) + list(folder.glob(".*"))


def test_the_largest_gemma_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path / "llama.cpp", "", monkeypatch)
    folder = pruned(save_tiny(tmp_path / "tiny", "gemma2"), "0,1")
    plan = {"num_layers": 46, "kept": [0, 1, 2, 3], "removed": list(range(4, 46))}
    edited("sglp_plan.json", **plan)(folder)
    assert "scale of attention by its 46 layers" in run_cli("export", folder, "--to", "gguf").error


def test_ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    file = write_gguf(tmp_path / "my.gguf")
    outcome = run_cli("export", file, "--to", "ollama", "--json")
    assert outcome.code == 0, outcome
    found = json.loads(outcome.out)
    assert found["files"] == [str(tmp_path / "Modelfile")]
    assert "ollama is not installed here" in found["notes"][0]
    assert (tmp_path / "Modelfile").read_text() == "FROM ./my.gguf\n"
    (tmp_path / "elsewhere").mkdir()
    assert run_cli("export", file, "--to", "ollama", "-o", tmp_path / "elsewhere" / "Modelfile").code == 0
    assert (tmp_path / "elsewhere" / "Modelfile").read_text() == f"FROM {file}\n"
    assert "already exists" in run_cli("export", file, "--to", "ollama").error
    (tmp_path / "Modelfile").unlink()
    assert "there is no such file" in run_cli("export", tmp_path / "no.gguf", "--to", "ollama").error


@pytest.mark.slow
def test_the_real_converter(tmp_path: Path) -> None:
    try:
        find_converter()
    except UserError as reason:
        pytest.skip(str(reason))
    if not SMOL.is_file():
        pytest.skip("needs a tokenizer that the converter knows: python tools/fetch_smollm2.py")
    tokenizer = AutoTokenizer.from_pretrained(SMOL.parent, gguf_file=SMOL.name)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    folder = pruned(tmp_path / "tiny", "1,4", "--max-shard-size", "1MB")
    outcome = run_cli("export", folder, "--to", "ollama", "--json")
    assert outcome.code == 0, outcome
    assert "at 128 of 128 positions; largest difference of logits 0 of" in json.loads(outcome.out)["notes"][0]
    assert torch.equal(logits(folder), logits(folder, gguf_file="model.gguf", dtype=torch.float32))
    shutil.rmtree(folder)
