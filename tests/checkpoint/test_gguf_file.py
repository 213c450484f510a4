"""A plan on a GGUF file: bytes against the source's, metadata, logits against plain transformers, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from checkpoints import SMALL, logits, logits_of, run_cli, save_tiny
from gguf import GGMLQuantizationType, GGUFWriter
from gguf_files import ARCHITECTURES, gguf_model, metadata, tensor_bytes, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM

from sglp_llm import prune
from sglp_llm.adapters.structure.gguf_keys import cut
from sglp_llm.calibration import CalibrationSet
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import plan_from_indices

REMOVED = (1, 4)
KEPT = (0, 2, 3, 5)
TOKENS = CalibrationSet(torch.arange(24).view(2, 12) + 3, torch.ones(2, 12, dtype=torch.bool), "ids", 0, "", False)
# A whole period, so that the windows of the others follow from the depth as before.
REGULAR = {"gemma2": (2, 3)}


def pruned(source: Path, output: Path, removed: tuple[int, ...] = REMOVED) -> Any:
    """Through the Python interface with token ids: the tiny tokenizer is none that transformers reads for Gemma."""
    return prune(source, output, plan=plan_from_indices(6, removed), calibration=TOKENS)


def plain_logits(file: Path, skip: tuple[int, ...] = ()) -> torch.Tensor:
    return logits(file.parent, skip, gguf_file=file.name, dtype=torch.float32)


def check_tensors(source: Path, output: Path, removed: tuple[int, ...]) -> None:
    """Every kept tensor's type, shape and bytes are the source's, and there are no others."""
    kept = [layer for layer in range(6) if layer not in removed]
    expected = {}
    for name, stored in tensor_bytes(source).items():
        parts = name.split(".")
        if parts[0] == "blk":
            if int(parts[1]) not in kept:
                continue
            parts[1] = str(kept.index(int(parts[1])))
        expected[".".join(parts)] = stored
    assert tensor_bytes(output) == expected


@pytest.mark.parametrize("quantised", ["Q8_0", "Q4_1"])
def test_tensors_are_copied_bit_for_bit_and_the_rest_of_the_metadata(quantised: str, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", quantised=GGMLQuantizationType[quantised])
    output = tmp_path / "out.gguf"
    report = pruned(source, output)
    check_tensors(source, output, REMOVED)
    before, after = metadata(source), metadata(output)
    plan = json.loads(after.pop("sglp_llm.plan"))
    assert (plan["removed"], plan["source"]["name"]) == (list(REMOVED), "tiny.gguf")
    assert before.pop("general.size_label") == "66K"
    assert after == {**before, "llama.block_count": 4}
    assert torch.equal(plain_logits(output), plain_logits(source, skip=REMOVED))
    assert report.verification["max_difference"] == 0
    assert report.bytes_written == output.stat().st_size


def test_the_file_computes_what_the_safetensors_export_of_the_same_plan_does(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", quantised=GGMLQuantizationType.Q4_0)
    for output in ("folder", "out.gguf"):
        outcome = run_cli("prune", source, "-o", tmp_path / output, "--plan", "1,4")
        assert outcome.code == 0, outcome
    assert torch.equal(logits(tmp_path / "folder"), plain_logits(tmp_path / "out.gguf"))


@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name != "llama"])
def test_families(model_type: str, tmp_path: Path) -> None:
    removed = REGULAR.get(model_type, REMOVED)
    changes = {"num_hidden_layers": 6, "sliding_window": 4} if "gemma" in model_type else {}
    source = write_gguf(tmp_path / "tiny.gguf", model_type, **changes)
    output = tmp_path / "out.gguf"
    report = pruned(source, output, removed)
    check_tensors(source, output, removed)
    expected = logits_of(gguf_model(model_type, **changes), skip=removed)
    if model_type == "gemma3_text":  # the layer without a window is no longer the sixth: only llama.cpp can be told
        assert "derive it from the depth" in report.notes[0]
        config = OpenedModel(output).source.config
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", config=config)
        torch.testing.assert_close(logits_of(model), expected)
    else:
        assert not report.notes
        torch.testing.assert_close(plain_logits(output), expected)


def test_windows_are_written_out_where_they_do_not_follow_from_the_depth(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", "gemma2", sliding_window=4)
    pruned(source, tmp_path / "out.gguf", (0, 3))
    key = "gemma2.attention.sliding_window_pattern"
    assert metadata(tmp_path / "out.gguf")[key] == [False, True, True, False]
    # The result is a source again, of the model that it is.
    again = tmp_path / "again.gguf"
    prune(tmp_path / "out.gguf", again, plan=plan_from_indices(4, [2]), calibration=TOKENS)
    assert metadata(again)[key] == [False, True, False]
    expected = logits_of(gguf_model("gemma2", sliding_window=4), skip=(0, 3, 4))
    torch.testing.assert_close(logits_of(OpenedModel(again).load().model), expected)
    assert AutoConfig.from_pretrained(tmp_path, gguf_file="again.gguf").layer_types[0] == "sliding_attention"


def test_every_array_with_an_entry_a_layer_is_cut(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "swiglu_clamp_exp": [0.5, 1.5, 2.5, 3.5, 4.5, 5.5],
        "an.array.of.a.later.release": [10, 11, 12, 13, 14, 15],
        "as.long.by.chance": [1, 2, 3, 4, 5],
        "rope.dimension_sections": [1, 2, 3, 4, 5, 6],
        "leading_dense_block_count": 2,
    }
    source = write_gguf(tmp_path / "tiny.gguf", extra=arrays)
    output = tmp_path / "out.gguf"
    pruned(source, output)
    after = {key.removeprefix("llama."): value for key, value in metadata(output).items()}
    assert after["an.array.of.a.later.release"] == [10, 12, 13, 15]
    assert after["swiglu_clamp_exp"] == [0.5, 2.5, 3.5, 5.5]
    # transformers reads no file with these, and refuses it before.
    assert cut("attention.head_count_kv", [0, 1, 2, 3, 4, 5], 6, KEPT) == [0, 2, 3, 5]
    assert after["as.long.by.chance"] == [1, 2, 3, 4, 5]
    assert after["rope.dimension_sections"] == [1, 2, 3, 4, 5, 6]
    assert after["leading_dense_block_count"] == 1


def test_an_analysis_ends_in_a_file_too_and_changes_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names without a folder
    source = write_gguf(Path("tiny.gguf"))
    outcome = run_cli("prune", source, "-o", "out.gguf", "--drop", 1, "--json", *SMALL)
    assert outcome.code == 0, outcome
    removed = tuple(json.loads(outcome.out)["plan"]["removed"])
    check_tensors(source, tmp_path / "out.gguf", removed)


def test_a_plan_for_the_checkpoint_that_the_file_was_converted_from(tmp_path: Path) -> None:
    gguf_model().save_pretrained(tmp_path / "original")
    plan = ("prune", tmp_path / "original", "--plan", "1,4", "-o", tmp_path / "pruned", "--no-verify")
    assert run_cli(*plan).code == 0
    source = write_gguf(tmp_path / "tiny.gguf")
    outcome = run_cli("prune", source, "--plan", tmp_path / "pruned", "-o", tmp_path / "out.gguf")
    assert outcome.code == 0, outcome
    check_tensors(source, tmp_path / "out.gguf", REMOVED)


def test_refused(tmp_path: Path) -> None:
    source, out = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "out.gguf"
    folder = save_tiny(tmp_path / "tiny")
    plan = ("--plan", "1")
    cases: list[tuple[Any, str]] = [
        ((source, *plan, "-o", tmp_path / "no" / "out.gguf"), "there is no folder"),
        ((source, *plan, "-o", source), "already exists"),
        ((source, *plan, "-o", source, "--overwrite"), "must lie outside the source"),
        ((folder, *plan, "-o", out), "a GGUF file is made of a GGUF file"),
        ((source, *plan, "-o", out, "--heal"), "leave out heal"),
        ((source, "--drop", 1, "--preset", "fast", "-o", out, *SMALL), "leave out heal"),
        ((source, *plan, "-o", out, "--max-shard-size", "1MB"), "leave out max_shard_size"),
        ((source, "--drop", 1, "--compensate", "scale", "-o", out, *SMALL), "leave out compensate"),
        ((source, *plan, "-o", out, "--push-to-hub", "a/b"), "upload it with `hf upload`"),
    ]
    for arguments, message in cases:
        assert message in run_cli("prune", *arguments).error
    # What llama.cpp would derive from another depth or other indices.
    for number, (model_type, extra, changes, message) in enumerate(
        (
            ("llama", {"interleave_moe_layer_step": 2}, {}, "llama.interleave_moe_layer_step = 2"),
            ("llama", {"nextn_predict_layers": 1}, {}, "llama.nextn_predict_layers = 1"),
            ("gemma2", {}, {"num_hidden_layers": 46}, "scale of attention by its 46 layers"),
        )
    ):
        odd = write_gguf(tmp_path / f"odd{number}.gguf", model_type, extra=extra, **changes)
        assert message in run_cli("prune", odd, *plan, "-o", out, "--no-verify").error
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_killed_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    source, out = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "out.gguf"
    out.write_bytes(b"before")
    if not (process := os.fork()):
        kill_in_the_middle(source, out)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    assert out.read_bytes() == b"before"
    prune(source, out, plan=plan_from_indices(6, [1]), verify=False, overwrite=True)
    assert not list(tmp_path.glob(".*"))
    check_tensors(source, out, (1,))


def kill_in_the_middle(source: Path, out: Path) -> None:
    whole, written = GGUFWriter.write_tensor_data, []

    def write(writer: GGUFWriter, tensor: Any) -> None:
        written.append(tensor)
        if len(written) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(writer, tensor)

    try:
        with patch.object(GGUFWriter, "write_tensor_data", write):
            prune(source, out, plan=plan_from_indices(6, [1]), verify=False, overwrite=True)
    finally:
        os._exit(0)  # not reached: the test sees another signal
