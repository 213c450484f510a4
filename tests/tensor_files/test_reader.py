"""The reader against safetensors and transformers, and against really damaged files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from sglp_llm.errors import UserError
from sglp_llm.tensor_files import read_index
from sglp_llm.tensor_files.reader import DTYPE_BYTES

TENSORS = {
    "model.a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "model.b": torch.arange(4, dtype=torch.bfloat16),
    "model.c": torch.tensor(7),
    "model.d": torch.zeros(0, 5, dtype=torch.float16),
    "model.é": torch.tensor([True, False, True]),
}


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(start: Any = 0, stop: Any = 4, shape: Any = (4,), dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two shards; the index names the tensors in no particular order."""
    first = {name: TENSORS[name] for name in ("model.a", "model.b")}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors", {"format": "pt", "shard": "first"})
    rest = {name: value for name, value in TENSORS.items() if name not in first}
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors", {"format": "pt"})
    weight_map = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in reversed(TENSORS)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def refusal(folder: Path) -> str:
    """The message with which the folder is refused: always one line that names a path in it."""
    with pytest.raises(UserError) as caught:
        read_index(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_single_file_agrees_with_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file, {"format": "pt"})
    index = read_index(tmp_path)
    assert index.folder == tmp_path
    assert index.files == (file,)
    assert index.metadata == {"format": "pt"}
    data = file.read_bytes()
    with safe_open(file, "pt") as oracle:
        assert list(index.tensors) == oracle.offset_keys()
        for name, entry in index.tensors.items():
            assert (entry.name, entry.file) == (name, file)
            assert entry.dtype == oracle.get_slice(name).get_dtype()
            assert list(entry.shape) == oracle.get_slice(name).get_shape()
            assert entry.num_elements == TENSORS[name].numel()
            raw = TENSORS[name].reshape(-1).view(torch.uint8).numpy().tobytes() if entry.num_elements else b""
            assert data[entry.offset : entry.offset + entry.nbytes] == raw


def test_shards_come_in_order_of_name_and_offset(sharded: Path) -> None:
    index = read_index(sharded)
    assert [file.name for file in index.files] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert index.metadata == {"format": "pt", "shard": "first"}
    assert set(index.tensors) == set(TENSORS)
    places = [(entry.file, entry.offset) for entry in index.tensors.values()]
    assert places == sorted(places)


def test_single_file_wins_over_an_index_as_in_transformers(sharded: Path) -> None:
    save_file({"other": torch.zeros(1)}, sharded / "model.safetensors")
    assert list(read_index(sharded).tensors) == ["other"]


def test_links_into_a_cache_work_as_in_a_hub_snapshot(sharded: Path) -> None:
    snapshot = sharded / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.glob("model*"))):
        blob = sharded / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    assert set(read_index(snapshot).tensors) == set(TENSORS)


def test_transformers_loads_tensors_that_the_index_forgets_and_so_do_we(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    forgotten = "model.layers.1.mlp.up_proj.weight"
    edit_index(tmp_path, lambda weight_map: weight_map.pop(forgotten))
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.state_dict()[forgotten], model.state_dict()[forgotten])
    assert set(read_index(tmp_path).tensors) == set(model.state_dict())


def test_every_dtype_of_safetensors_is_known_with_its_size(tmp_path: Path) -> None:
    for dtype, size in DTYPE_BYTES.items():
        file = tmp_path / "model.safetensors"
        file.write_bytes(with_header({"x": tensor(0, 3 * size, [3], dtype)}, bytes(3 * size)))
        assert read_index(tmp_path).tensors["x"].nbytes == 3 * size
        with safe_open(file, "np") as oracle:
            assert oracle.get_slice("x").get_dtype() == dtype


# What the file holds, a part of the message, and whether safetensors refuses it too.
DAMAGED = {
    "empty file": (b"", "0 bytes", True),
    "shorter than its prefix": (b"\x02\0\0", "3 bytes", True),
    "header beyond the end": ((100).to_bytes(8, "little") + b"{}", "10 bytes", True),
    "header of more than 100 MB": ((100_000_001).to_bytes(8, "little") + b"{}", "100000001", True),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull", True),
    "not JSON": (with_header(b"{'x': 1}"), "not JSON", True),
    "not UTF-8": (with_header(b'{"\xff": 1}'), "not JSON", True),
    "half a surrogate pair": (
        with_header(b'{"\\uD800": ' + json.dumps(tensor()).encode() + b"}", b"1234"),
        "not JSON",
        True,
    ),
    "nested too deeply": (with_header(b'{"x":' * 100_000), "not JSON", True),
    "not a number of JSON": (with_header(b'{"x": NaN}'), "not JSON", True),
    "the same key twice": (
        with_header(b'{"x": %b, "x": %b}' % ((json.dumps(tensor()).encode(),) * 2), b"1234"),
        "twice",
        False,
    ),
    "a list": (with_header([]), "JSON object", True),
    "no object for a tensor": (with_header({"x": 3}), "'x' must have dtype", True),
    "no shape": (with_header({"x": {"dtype": "U8", "data_offsets": [0, 4]}}, b"1234"), "'x' must have dtype", True),
    "unknown dtype": (with_header({"x": tensor(dtype="F128")}, b"1234"), "'F128'; known: BOOL", True),
    "dtype of no text": (with_header({"x": tensor(dtype=["U8"])}, b"1234"), "dtype ['U8']", True),
    "packed dtype": (with_header({"x": tensor(dtype="F4", shape=(8,))}, b"1234"), "dtype 'F4'", False),
    "negative size": (with_header({"x": tensor(shape=[-4])}, b"1234"), "shape [-4]", True),
    "truth as a size": (with_header({"x": tensor(0, 1, [True])}, b"1"), "shape [True]", True),
    "fraction as a size": (with_header({"x": tensor(shape=[4.0])}, b"1234"), "shape [4.0]", True),
    "size beyond 64 bits": (with_header({"x": tensor(0, 0, [2**62, 2**62, 0])}), "shape [4611", True),
    "one offset": (
        with_header({"x": {"dtype": "U8", "shape": [4], "data_offsets": [4]}}, b"1234"),
        "offsets [4]",
        True,
    ),
    "negative offset": (with_header({"x": tensor(-4, 0)}, b"1234"), "data_offsets [-4, 0]", True),
    "end before begin": (with_header({"x": tensor(4, 0)}, b"1234"), "data_offsets [4, 0]", True),
    "bytes that do not fit the shape": (with_header({"x": tensor(shape=[2])}, b"1234"), "do not fit U8", True),
    "overlap": (with_header({"x": tensor(), "y": tensor(2, 6)}, b"123456"), "'y' overlaps", True),
    "hole": (with_header({"x": tensor(), "y": tensor(5, 9)}, b"123456789"), "'y' leaves a hole", True),
    "data that begin late": (with_header({"x": tensor(1, 5)}, b"12345"), "'x' leaves a hole", True),
    "truncated": (with_header({"x": tensor()}, b"123"), "truncated", True),
    "trailing bytes": (with_header({"x": tensor()}, b"12345"), "too long", True),
    "metadata of no texts": (with_header({"__metadata__": {"a": 1}, "x": tensor()}, b"1234"), "__metadata__", True),
    "metadata of another kind": (with_header({"__metadata__": "a", "x": tensor()}, b"1234"), "__metadata__", True),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_refused(name: str, tmp_path: Path) -> None:
    content, expected, safetensors_refuses = DAMAGED[name]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    message = refusal(tmp_path)
    assert str(file) in message
    assert expected in message
    if safetensors_refuses:
        with pytest.raises(SafetensorError):
            load_file(file)


@pytest.mark.parametrize("content", [{}, {"__metadata__": None, "x": tensor()}, {"x": tensor() | {"more": 1}}])
def test_unusual_file_that_safetensors_reads_is_read(content: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(with_header(content, b"1234" if "x" in content else b""))
    assert set(read_index(tmp_path).tensors) == set(load_file(file))


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        refusal(tmp_path)


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    assert "neither model.safetensors nor" in refusal(tmp_path)
    assert "neither model.safetensors nor" in refusal(tmp_path / "nowhere")
    assert "neither model.safetensors nor" in refusal(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "not a JSON file"),
        (b"\xff", "not a JSON file"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": {"x": 1}}', "plain file name, not 1"),
        (b'{"weight_map": {"x": "a", "x": "b"}}', "twice"),
    ],
)
def test_index_that_is_none_is_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize(
    "outside", ["../x.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "..", "", "a\0", "a\\b"]
)
def test_index_may_not_lead_outside(outside: str, sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"model.a": outside}))
    assert "plain file name" in refusal(sharded)


def test_missing_shard_is_refused(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: there is no such file" in refusal(sharded)
    (sharded / "model-00002-of-00002.safetensors").symlink_to("nowhere")
    assert "model-00002-of-00002.safetensors: there is no such file" in refusal(sharded)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    os.mkfifo(sharded / "model-00002-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors: there is no such file" in refusal(sharded)


def test_index_that_contradicts_its_shards_is_refused(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update(ghost="model-00001-of-00002.safetensors"))
    assert "'ghost' is said to be in model-00001" in refusal(sharded)
    edit_index(sharded, lambda weight_map: weight_map.pop("ghost"))
    edit_index(sharded, lambda weight_map: weight_map.update({"model.a": "model-00002-of-00002.safetensors"}))
    assert "'model.a' is said to be in model-00002" in refusal(sharded)


def test_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file(TENSORS, sharded / "model-00002-of-00002.safetensors")
    message = refusal(sharded)
    assert "model-00002-of-00002.safetensors: tensor 'model." in message
    assert "stands in model-00001-of-00002.safetensors too" in message


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    assert "cannot read the file (Permission denied)" in refusal(tmp_path)


def test_no_tensor_library_is_imported() -> None:
    code = (
        "import sys, sglp_llm.tensor_files.reader, sglp_llm.tensor_files.writer\n"
        "assert not {'torch', 'numpy', 'safetensors', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
