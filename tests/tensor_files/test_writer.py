"""The writer against safetensors, full disks and refusing kernels."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sglp_llm.checkpoint import atomic_folder
from sglp_llm.errors import UserError
from sglp_llm.tensor_files import read_index, writer
from sglp_llm.tensor_files.reader import DTYPE_BYTES
from sglp_llm.tensor_files.tensors import new_tensor
from sglp_llm.tensor_files.writer import NamedEntry, write_safetensors, write_shards

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I16": torch.int16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ignore(_: int) -> None:
    """The `Advance` nobody listens to."""


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """What makes two tensors the same, NaNs included."""
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return tensor.dtype, tensor.shape, raw


def random_tensor(dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    high = 2 if dtype == "BOOL" else 256
    count = DTYPE_BYTES[dtype]
    for size in shape:
        count *= size
    return (
        torch.randint(high, (count,), dtype=torch.uint8, generator=generator).view(TORCH_DTYPES[dtype]).reshape(shape)
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of one file with tensors of 100 kB each."""
    folder = tmp_path / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{number}": random_tensor("BF16", (50, 1000), generator) for number in range(5)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@contextmanager
def disk_of_300_kb() -> Iterator[None]:
    """No file may grow beyond 300 kB: the nearest thing to a full disk that needs no privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    kinds = draw(
        st.dictionaries(
            st.text(st.characters(codec="utf-8"), max_size=5), st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), shapes)
        )
    )
    kinds.pop("__metadata__", None)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return {name: random_tensor(dtype, shape, generator) for name, (dtype, shape) in kinds.items()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), before=checkpoints(), metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
def test_copies_are_what_safetensors_read_before(
    data: st.DataObject,
    before: dict[str, torch.Tensor],
    metadata: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("copies")
    save_file(before, folder / "model.safetensors", metadata or None)
    tensors = read_index(folder).tensors
    chosen = data.draw(
        st.permutations(sorted(tensors)).map(lambda names: names[: data.draw(st.integers(0, len(names)))])
    )
    renamed = {f"{number}.{name}": name for number, name in enumerate(chosen)}
    copied: list[int] = []
    file = folder / "copy.safetensors"
    write_safetensors(file, [(new, tensors[old]) for new, old in renamed.items()], metadata, copied.append)
    after = load_file(file)
    assert {new: bits(tensor) for new, tensor in after.items()} == {
        new: bits(before[old]) for new, old in renamed.items()
    }
    assert sum(copied) == sum(tensors[old].nbytes for old in chosen)
    with safe_open(file, "pt") as oracle:
        assert (oracle.metadata() or {}) == metadata


def test_tensors_from_memory_stand_among_those_of_files(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "CHUNK_BYTES", 30_000)
    new = torch.randn(100, 200).T
    entries: list[NamedEntry] = list(read_index(source).tensors.items())
    entries[2] = ("new", new_tensor(new))
    entries.append(("half", new_tensor(new.half())))
    copied: list[int] = []
    write_safetensors(source / "copy", entries, {}, copied.append)
    before, after = load_file(source / "model.safetensors"), load_file(source / "copy")
    expected = {**before, "new": new.contiguous(), "half": new.half().contiguous()}
    del expected["t2"]
    assert {name: bits(tensor) for name, tensor in after.items()} == {n: bits(t) for n, t in expected.items()}
    assert max(copied) == 30_000
    assert sum(copied) == sum(tensor.nbytes for tensor in expected.values())


def test_every_tensor_is_aligned_whatever_the_order(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(3), "c": torch.ones(1).half()}, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "model.safetensors")
    tensors = read_index(tmp_path).tensors
    copy = tmp_path / "copy"
    copy.mkdir()
    write_safetensors(copy / "model.safetensors", [(name, tensors[name]) for name in "acb"], {}, ignore)
    for copied in read_index(copy).tensors.values():
        assert copied.offset % DTYPE_BYTES[copied.dtype] == 0


def test_an_unchanged_file_is_copied_in_one_range_and_byte_for_byte(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[int] = []
    original = os.copy_file_range

    def recorded(src: int, dst: int, count: int, **rest: int) -> int:
        ranges.append(count)
        return original(src, dst, count, **rest)

    monkeypatch.setattr(os, "copy_file_range", recorded)
    index = read_index(source)
    write_safetensors(source / "copy", list(index.tensors.items()), index.metadata, ignore)
    assert ranges[0] == 500_000
    assert (source / "copy").read_bytes() == (source / "model.safetensors").read_bytes()


def test_progress_moves_in_chunks(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "CHUNK_BYTES", 60_000)
    copied: list[int] = []
    write_safetensors(source / "copy", list(read_index(source).tensors.items()), {}, copied.append)
    assert max(copied) <= 60_000
    assert sum(copied) == 500_000


def refuse(code: int) -> Callable[..., int]:
    """A system call that fails."""

    def call(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("sendfile", ["works", "refuses", "missing"])
@pytest.mark.parametrize(
    "copy_file_range", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, "zero", "missing"]
)
def test_other_ways_of_copying_take_over(
    copy_file_range: int | str, sendfile: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if copy_file_range == "missing":
        monkeypatch.delattr(os, "copy_file_range")
    elif copy_file_range == "zero":
        monkeypatch.setattr(os, "copy_file_range", lambda *_, **__: 0)
    else:
        monkeypatch.setattr(os, "copy_file_range", refuse(int(copy_file_range)))
    if sendfile == "refuses":
        monkeypatch.setattr(os, "sendfile", refuse(errno.EINVAL))
    elif sendfile == "missing":
        monkeypatch.delattr(os, "sendfile")
    index = read_index(source)
    copied: list[int] = []
    write_safetensors(source / "copy", list(index.tensors.items()), index.metadata, copied.append)
    assert (source / "copy").read_bytes() == (source / "model.safetensors").read_bytes()
    assert sum(copied) == 500_000


def test_short_copies_go_on_and_a_way_may_fail_in_the_middle(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_file_range, sendfile, write = os.copy_file_range, os.sendfile, os.write
    calls: list[str] = []

    def tired(name: str) -> None:
        calls.append(name)
        if calls.count(name) > 50:
            raise OSError(errno.EINVAL, "Invalid argument")

    def some_copy_file_range(src: int, dst: int, count: int, offset_src: int) -> int:
        tired("copy_file_range")
        return copy_file_range(src, dst, min(count, 999), offset_src=offset_src)

    def some_sendfile(target: int, source: int, offset: int, count: int) -> int:
        tired("sendfile")
        return sendfile(target, source, offset, min(count, 777))

    monkeypatch.setattr(os, "copy_file_range", some_copy_file_range)
    monkeypatch.setattr(os, "sendfile", some_sendfile)
    monkeypatch.setattr(os, "write", lambda target, data: write(target, data[:5000]))
    index = read_index(source)
    write_safetensors(source / "copy", list(index.tensors.items()), index.metadata, ignore)
    assert (source / "copy").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_copies_between_file_systems(source: Path) -> None:
    shutil.rmtree(elsewhere := Path(f"/dev/shm/test-checkpoint-{os.getpid()}"), ignore_errors=True)
    elsewhere.mkdir()
    try:
        index = read_index(source)
        write_safetensors(elsewhere / "copy", list(index.tensors.items()), index.metadata, ignore)
        assert (elsewhere / "copy").read_bytes() == (source / "model.safetensors").read_bytes()
    finally:
        shutil.rmtree(elsewhere)


def test_source_that_became_shorter_is_refused(source: Path) -> None:
    tensors = list(read_index(source).tensors.items())
    os.truncate(source / "model.safetensors", 200_000)
    with pytest.raises(UserError, match=r"model\.safetensors: ends \d+ bytes early"):
        write_safetensors(source / "copy", tensors, {}, ignore)


def test_existing_file_is_left_alone(source: Path) -> None:
    before = (source / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError):
        write_safetensors(source / "model.safetensors", list(read_index(source).tensors.items()), {}, ignore)
    assert (source / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("ways", [3, 2, 1])
def test_disk_that_fills_up_is_an_error_and_leaves_nothing(
    ways: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ways < 3:
        monkeypatch.delattr(os, "copy_file_range")
    if ways < 2:
        monkeypatch.delattr(os, "sendfile")
    index = read_index(source)
    output = source.parent / "output"
    with (
        pytest.raises(UserError, match="cannot be written: File too large"),
        disk_of_300_kb(),
        atomic_folder(output) as folder,
    ):
        write_shards(folder, [list(index.tensors.items())], index.metadata, ignore)
    assert names(source.parent) == ["source"]


def test_no_space_left_is_not_taken_for_an_unsupported_call(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(source / "copy", list(read_index(source).tensors.items()), {}, ignore)


def test_one_shard_needs_no_index(source: Path, tmp_path: Path) -> None:
    index = read_index(source)
    write_shards(tmp_path, [[], list(index.tensors.items()), []], index.metadata, ignore)
    assert names(tmp_path) == ["model.safetensors", "source"]
