"""Inputs that once ended in a traceback, in a hang, in gigabytes, in an empty message or in one of 300 kB."""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import SMALL, copied, edited, run_cli
from hostile import attempt
from hostile_data import as_json

from sglp_llm.calibration import files, sequences
from sglp_llm.criteria import make_criterion
from sglp_llm.errors import UserError, one_line
from sglp_llm.plan import load_recipe
from sglp_llm.trials import Journal

BUDGETS = ["drop", "ratio", "target-params", "target-memory", "target-latency", "plan"]
OTHER_NUMBERS = ["context", "samples", "seq-len", "seed", "num-segments", "protect-first", "min-drop", "batch-size"]
OTHER_NUMBERS += ["search-budget", "option"]
RESIDENT = ("--engine", "resident")
PLAN = {"num_layers": 6, "removed": [2, 4]}


def said(*arguments: object) -> str:
    """The message of a command that refuses its input."""
    outcome = run_cli(*arguments)
    assert outcome.code == 2, outcome.err
    assert len(outcome.err) <= 300, outcome.err
    return outcome.error


def prune_by(file: Path, source: Path, output: Path) -> str:
    return said("prune", source, "--plan", file, "--no-verify", *RESIDENT, "-o", output)


PIPES: dict[str, tuple[str, Callable[[Path, Path, Path], str]]] = {
    "configuration": ("config.json", lambda pipe, source, out: said("plan-memory", pipe.parent)),
    "generation settings": ("generation_config.json", lambda pipe, source, out: said("plan-memory", pipe.parent)),
    "tokenizer": ("tokenizer.json", lambda pipe, source, out: said("eval", pipe.parent, "--data", SMALL[1])),
    "plan": ("mine.json", lambda pipe, source, out: prune_by(pipe, source, out)),
    "folder's plan": ("sglp_plan.json", lambda pipe, source, out: said("export", pipe.parent, "--to", "mergekit")),
    "plan of mergekit": ("mine.yaml", lambda pipe, source, out: prune_by(pipe, source, out)),
    "recipe": ("mine.yaml", lambda pipe, source, out: said("plan-memory", source, "--recipe", pipe)),
    "suite": ("mine.yaml", lambda pipe, source, out: said("eval", source, "--suite", pipe)),
    "text": ("mine", lambda pipe, source, out: said("eval", source, "--data", f"text:{pipe}")),
    "packed text": ("mine.gz", lambda pipe, source, out: said("eval", source, "--data", f"text:{pipe}")),
    "lines": ("mine", lambda pipe, source, out: said("eval", source, "--data", f"jsonl:{pipe}:text")),
}


@pytest.mark.parametrize("case", PIPES)
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder"])
def test_special_files_are_not_waited_for(source: Path, tmp_path: Path, case: str, kind: str) -> None:
    name, refused = PIPES[case]
    folder = copied(source, tmp_path / "in")
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "endless":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    if kind == "folder" and case in ("generation settings", "tokenizer", "folder's plan", "plan"):
        return  # transformers reads no folder, and that of a plan may be given
    message = refused(folder / name, source, tmp_path / "out")
    assert {"pipe": "this is a pipe", "endless": "this is a device", "folder": "this is a folder"}[kind] in message


def test_a_piece_of_a_journal_that_is_a_pipe_is_made_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    journal.once("one", lambda: 1)
    for file in tmp_path.iterdir():
        if '"one"' in file.read_text():
            file.unlink()
            os.mkfifo(file)
    assert Journal(tmp_path, {}).once("one", lambda: 2) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_hidden_layers": 2**31}, "no model has more than 10000"),
        ({"num_hidden_layers": "6"}, ""),
        ({"num_hidden_layers": -1}, ""),
        ({"hidden_size": 2**31}, "hidden_size is 2147483648, and no model is wider"),
        ({"hidden_size": 2**17}, "the files hold at most"),
        ({"intermediate_size": 2**23}, "the files hold at most"),
        ({"vocab_size": 10**400}, "a number of more than 40 digits"),
        ({"rms_norm_eps": "x"}, ""),
        ({"model_type": "\ud800"}, "not text"),
        ({"hidden_act": ["silu"]}, ""),
    ],
    ids=str,
)
def test_counts_are_checked_before_anything_is_made(
    source: Path, tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    folder = copied(source, tmp_path / "in" / "model", edited("config.json", **change))
    assert attempt("plan-memory", folder, inputs=folder) in (0, 2)
    message = said("prune", folder, "--drop", "2", "--criterion", "bi", *SMALL, *RESIDENT, "-o", tmp_path / "out")
    assert expected in message


def test_a_configuration_nested_200000_deep(source: Path, tmp_path: Path) -> None:
    folder = copied(source, tmp_path / "in")
    (folder / "config.json").write_bytes(b"[" * 200_000 + b"]" * 200_000)
    assert "nested too deeply" in said("plan-memory", folder)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({"num_layers": 10**9, "removed": [1]}, "num_layers is 1000000000, and no model has more than 10000"),
        ({"num_layers": 6, "removed": [10**399]}, "a number of more than 40 digits"),
        ({"num_layers": 6, "removed": ["x" * 300_000]}, "expected a list of whole numbers"),
        ({**PLAN, "revision": ["x"]}, "revision must be"),
    ],
)
def test_plans(source: Path, tmp_path: Path, plan: dict[str, object], expected: str) -> None:
    (tmp_path / "mine.json").write_bytes(as_json(plan))
    assert expected in prune_by(tmp_path / "mine.json", source, tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [
        {"protect": {"first": "a"}},
        {"protect": [1]},
        {"criterion": ["a"]},
        {"scored_by": {"a": 1}},
        {"calibration": 3, "seq_len": "long"},
        {"search": {"segments": [[0, "a"]], "races": [{"costs": [["a", None]]}]}},
        {"search": {"segments": [[5, 0]], "races": 3}},
        {"features": 7, "context": "x", "decode_times": [1]},
    ],
    ids=str,
)
def test_settings_of_another_shape_do_no_harm(source: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    scores = {"bi": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}
    plan = {**PLAN, "settings": settings, "scores": scores, "budget": {"target_memory": "1GB", "target_latency": "1ms"}}
    plan |= {
        "segments": [[0, 6]],
        "compensation": {"method": ["a"], "cuts": 7, "losses": "none"},
        "versions": {"a": [1]},
    }
    (tmp_path / "mine.json").write_bytes(as_json(plan))
    out = tmp_path / "out"
    attempt(
        "prune",
        source,
        "--plan",
        tmp_path / "mine.json",
        "--no-verify",
        *RESIDENT,
        "-o",
        out,
        inputs=source,
        output=out,
    )


@pytest.mark.parametrize("text", [b"[]", b"0", b"{}"])
def test_a_record_of_a_training_of_another_shape(source: Path, tmp_path: Path, text: bytes) -> None:
    (tmp_path / "sglp_plan.json").write_bytes(as_json(PLAN))
    (tmp_path / "train_log.jsonl").write_bytes(text)
    (tmp_path / "sglp_healing.json").write_bytes(text)
    assert run_cli("report", tmp_path).code in (0, 2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("{gradnorm: {norm: [1]}}", "gradnorm.norm must be text"),
        ("{gradnorm: {1: 3}}", "unknown option of the criterion gradnorm '1'"),
        ("{gradnorm: null}", "must be settings by criterion"),
        ("{1: 3}", "must be settings by criterion"),
        ("&a {gradnorm: *a}", "nested too deeply"),
        ("{gradnorm: {norm: 2001-01-01}}", "gradnorm.norm must be text"),
    ],
)
def test_options_of_other_types(source: Path, tmp_path: Path, options: str, expected: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"criterion: gradnorm\noptions: {options}\n")
    assert expected in said("plan-memory", source, "--recipe", tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("criterion: __init__", "unknown criterion '__init__'"),
        ("criterion: base", "unknown criterion 'base'"),
        ('model: "a\\0b"', "text without zero bytes"),
        ('calibration: "text:\\0"', "text without zero bytes"),
        (f"seed: {'9' * 400}", "a number of more than 40 digits"),
        (f"seed: {'9' * 39}", "a number of at most 64 bits"),
        (f"seed: {'9' * 5000}", "not a YAML file"),
        ("samples: .inf", "must be a whole number"),
    ],
)
def test_recipes(source: Path, tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=expected):
        make_criterion(load_recipe(tmp_path / "mine.yaml").criterion, 6)
    said("plan-memory", source, "--recipe", tmp_path / "mine.yaml")


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize(
    "option",
    BUDGETS + OTHER_NUMBERS,
)
def test_numbers_of_many_digits(source: Path, tmp_path: Path, option: str, digits: int) -> None:
    number = "9" * digits
    value = {"option": f"gradnorm.norm={number}", "target-latency": f"{number}x"}.get(option, number)
    budget = () if option in BUDGETS else ("--drop", "1")
    said(
        "prune",
        source,
        *budget,
        f"--{option}",
        value,
        *(() if option == "plan" else ("--no-heal",)),
        "-o",
        tmp_path / "out",
    )


def gguf_with(name: bytes, kind: int, value: bytes) -> bytes:
    field = struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (gguf_with(b"llama.block_count", 4, struct.pack("<I", 2**31)), "no model has more than 10000"),
        (gguf_with(b"a", 9, struct.pack("<IQ", 0, 2**40)), "it ends after"),
        (gguf_with(b"a", 9, struct.pack("<IQ", 8, 2**60)), "it ends after"),
        (gguf_with(b"a", 8, struct.pack("<Q", 2**62)), "it ends after"),
        (gguf_with(b"a", 99, b""), "a field of type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "tensors and"),
        (b"GGUF" + struct.pack(">IQQ", 3, 2**60, 0), "tensors and"),
        (b"GGUF" + struct.pack("<IQQ", 7, 0, 0), "is neither 2 nor 3"),
    ],
)
def test_gguf_headers(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "tiny.gguf").write_bytes(content)
    assert expected in said("plan-memory", tmp_path / "tiny.gguf")


@pytest.mark.parametrize("form", ["text:{}", "jsonl:{}:text", "chat:{}"])
@pytest.mark.parametrize("filling", [b"\0", b"\n", b"9"])
def test_bombs(source: Path, tmp_path: Path, form: str, filling: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller bounds than ours: what is read to the bound is tokenised."""
    monkeypatch.setattr(files, "MOST_LINE_BYTES", 2**18)
    monkeypatch.setattr(sequences, "ENOUGH_TEXT_BYTES", 2**18)
    block = gzip.compress(filling * 2**24, 1)
    (tmp_path / "mine.gz").write_bytes(block * 64)  # a gigabyte in a few hundred kilobytes
    options = ("--calibration", form.format(tmp_path / "mine.gz"), "--samples", "2", "--seq-len", "8", *RESIDENT)
    assert attempt("analyze", source, "--drop", "1", "--criterion", "bi", *options, inputs=tmp_path) in (0, 2)


def test_a_tokenizer_whose_library_panics(source: Path, tmp_path: Path) -> None:
    """An error of Rust is no `Exception`: a template names a token that is not there."""
    folder = copied(source, tmp_path / "in" / "model")
    file = folder / "tokenizer.json"
    parts = [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": parts, "pair": [], "special_tokens": {}}
    file.write_bytes(as_json({**json.loads(file.read_text()), "post_processor": processor}))
    message = said("prune", folder, "--plan", "2,4", *SMALL[:2], *RESIDENT, "-o", tmp_path / "out")
    assert "cannot load the tokenizer (PanicException: no entry found for key)" in message


@pytest.mark.parametrize("verb", ["eval", "heal"])
@pytest.mark.parametrize("digits", [400, 5000])
def test_batch_sizes_of_many_digits(source: Path, tmp_path: Path, verb: str, digits: int) -> None:
    options = ("-o", tmp_path / "out", "--data", SMALL[1]) if verb == "heal" else ("--data", SMALL[1])
    assert "batch" in said(verb, source, "--batch-size", "9" * digits, *options)


def test_messages_are_bounded_and_printable() -> None:
    long = one_line(f"FILE: \x1b[31m\u202e{'x' * 300_000}: say y instead")
    assert len(long) <= 280
    assert long.isprintable()
    assert long.startswith("FILE: \\x1b[31m\\u202exxx")
    assert long.endswith("xxx: say y instead")
    assert one_line(" one\n two\r\n") == "one two"


def test_a_name_with_digits_of_another_script(source: Path, tmp_path: Path) -> None:
    folder = copied(source, tmp_path / "in")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    for digits in ("\u0663", "03", "\u00b3"):
        text = (
            data[8 : 8 + size]
            .decode()
            .replace("model.layers.3.input_layernorm", f"model.layers.{digits}.input_layernorm")
        )
        header = json.dumps(json.loads(text)).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
        out = tmp_path / f"out{ord(digits[0])}"
        attempt("prune", folder, "--plan", "2,4", "--no-verify", *RESIDENT, "-o", out, inputs=folder, output=out)
        said("prune", folder, "--plan", "2,4", *SMALL[:2], *RESIDENT, "-o", tmp_path / "none")
