"""Token sequences against a plain call of the tokenizer on the joined text."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest
import torch
from helpers import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from sglp_llm.calibration import calibration_set, evaluation_windows, load_documents, packing
from sglp_llm.calibration.packing import adds_bos
from sglp_llm.errors import UserError

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "Zürich", "is", "far;", "naïve", "42")


def some_text(words: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture
def long_file(tmp_path: Path) -> str:
    file = tmp_path / "long.txt"
    file.write_text("\n".join(some_text(40, line) for line in range(60)), encoding="utf-8")
    return f"text:{file}"


@pytest.fixture
def many_documents(tmp_path: Path) -> str:
    file = tmp_path / "many.jsonl"
    rows = [json.dumps({"text": some_text(30, number)}) for number in range(300)]
    file.write_text("\n".join(rows), encoding="utf-8")
    return f"jsonl:{file}:text"


def plain_ids(text: str) -> list[int]:
    return tiny_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("bos", [False, True])
def test_calibration_sequences_are_windows_of_the_text(long_file: str, bos: bool) -> None:
    data = calibration_set(tiny_tokenizer(bos), long_file, samples=6, seq_len=32, seed=3)
    assert data.input_ids.shape == (6, 32)
    assert (data.input_ids.dtype, data.mask.dtype) == (torch.int64, torch.bool)
    assert bool(data.mask.all())
    assert (data.source, data.seed, data.bos) == (long_file, 3, bos)
    body = 32 - bos
    ids = plain_ids(next(load_documents(long_file, "train")))
    possible = [ids[start : start + body] for start in range(0, len(ids) - body + 1, body)]
    found = [possible.index(row[bos:]) for row in data.input_ids.tolist()]
    assert len(set(found)) == 6
    assert max(found) > 6  # a sample of the whole text, not its beginning
    assert not bos or set(data.input_ids[:, 0].tolist()) == {0}


def test_the_same_seed_gives_the_same_sequences_and_another_seed_others(many_documents: str) -> None:
    def ids(seed: int) -> tuple[str, torch.Tensor]:
        data = calibration_set(tiny_tokenizer(), many_documents, samples=8, seq_len=16, seed=seed)
        return data.hash, data.input_ids

    torch.manual_seed(0)
    random.seed(0)
    first = ids(0)
    torch.manual_seed(1)
    random.seed(1)
    again, other = ids(0), ids(1)
    assert first[0] == again[0] != other[0]
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert len(first[0]) == 64


def test_the_choice_is_the_same_on_every_machine(many_documents: str) -> None:
    data = calibration_set(tiny_tokenizer(), many_documents, samples=2, seq_len=8)
    assert data.hash == "16ce11b9ab6e490bb8c2e653cb5390ffa0aad5f955fd00a75ed1e99fdf169740"


@pytest.mark.parametrize("guess", [0, 1, packing.CHARACTERS_PER_TOKEN])
def test_reading_stops_when_there_is_enough_text(
    many_documents: str, guess: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "POOL_DOCUMENTS", 10)
    monkeypatch.setattr(packing, "CHARACTERS_PER_TOKEN", guess)
    file = Path(many_documents.split(":")[1])
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([*lines[:100], "this line is damaged"]), encoding="utf-8")
    assert calibration_set(tiny_tokenizer(), many_documents, samples=10, seq_len=16).input_ids.shape == (10, 16)
    with pytest.raises(UserError, match="line 101: not JSON"):
        calibration_set(tiny_tokenizer(), many_documents, samples=100, seq_len=128)


@pytest.mark.parametrize("limit", ["POOL_DOCUMENTS", "POOL_CHARACTERS"])
def test_a_bounded_pool_loses_and_repeats_nothing(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, limit, 7)
    documents = [str(number) for number in range(50)]
    shuffled = list(packing.shuffled(documents, random.Random(0)))
    assert shuffled != documents
    assert sorted(shuffled) == sorted(documents)


@pytest.mark.parametrize("bos", [False, True])
def test_evaluation_windows_are_the_text_from_its_beginning(many_documents: str, bos: bool) -> None:
    data = evaluation_windows(tiny_tokenizer(bos), many_documents, window=50, max_windows=None, bos=None)
    ids = plain_ids("\n\n".join(load_documents(many_documents, "test")))
    body = 50 - bos
    assert (data.source, data.bos) == (many_documents, bos)
    assert data.input_ids.shape == (len(ids) // body, 50)
    assert data.input_ids[:, int(bos) :].flatten().tolist() == ids[: len(ids) // body * body]
    assert not bos or set(data.input_ids[:, 0].tolist()) == {0}


def test_bos_can_be_left_out_where_the_tokenizer_adds_one(long_file: str) -> None:
    with_bos = tiny_tokenizer(bos=True)
    assert adds_bos(with_bos)
    assert not adds_bos(tiny_tokenizer())
    without = evaluation_windows(with_bos, long_file, window=16, bos=False)
    plain = evaluation_windows(tiny_tokenizer(), long_file, window=16)
    assert not without.bos
    assert torch.equal(without.input_ids, plain.input_ids)


def test_bos_can_be_added_where_the_tokenizer_only_knows_one(long_file: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "</s>"
    assert not adds_bos(tokenizer)
    data = evaluation_windows(tokenizer, long_file, window=16, bos=True)
    assert data.bos
    assert set(data.input_ids[:, 0].tolist()) == {1}


def test_bos_without_a_bos_token_is_refused(long_file: str) -> None:
    with pytest.raises(UserError, match="this tokenizer has none"):
        evaluation_windows(tiny_tokenizer(), long_file, window=16, bos=True)


@settings(max_examples=25, deadline=None)
@given(window=st.integers(2, 60), most=st.integers(1, 80), bos=st.booleans())
def test_fewer_windows_are_the_first_ones(window: int, most: int, bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos)
    every = evaluation_windows(tokenizer, "pydoc", window=window).input_ids
    first = evaluation_windows(tokenizer, "pydoc", window=window, max_windows=most).input_ids
    assert len(first) == min(most, len(every))
    assert torch.equal(first, every[:most])


def test_a_text_longer_than_one_call_is_cut_at_line_breaks(long_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 500)
    pieces = evaluation_windows(tiny_tokenizer(), long_file, window=16).input_ids
    text = next(load_documents(long_file, "test"))
    assert tiny_tokenizer().decode(pieces.flatten()) == text[: len(tiny_tokenizer().decode(pieces.flatten()))]
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 7)  # shorter than a line: cut anywhere, lose nothing
    assert tiny_tokenizer().decode(packing.tokenise(tiny_tokenizer(), text)) == text


def test_no_warning_that_the_text_is_longer_than_the_context(
    long_file: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers does not hand its messages on to the root logger, where caplog listens.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")  # the command line lowers it, in this process too
    calibration_set(tiny_tokenizer(), long_file, samples=2, seq_len=128)
    assert not caplog.records
    tiny_tokenizer()("a" * 100)
    assert "longer than the specified maximum" in caplog.text


def test_the_defaults_are_train_for_calibration_and_test_for_evaluation() -> None:
    tokenizer = tiny_tokenizer()
    assert calibration_set(tokenizer, "pydoc", samples=1, seq_len=8).source == "pydoc:train"
    assert calibration_set(tokenizer, "pydoc:test", samples=1, seq_len=8).source == "pydoc:test"
    evaluated = evaluation_windows(tokenizer, "pydoc", window=8, max_windows=2)
    assert evaluated.source == "pydoc:test"
    assert torch.equal(
        evaluated.input_ids.flatten(), torch.tensor(plain_ids(next(load_documents("pydoc", "test")))[:16])
    )


def test_too_little_text_says_how_much_there_is_and_what_to_lower(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("a" * 100)
    spec = f"text:{file}"
    with pytest.raises(
        UserError, match=r"has 100 tokens, but 32 sequences of 30 need 960; lower samples to 3 or seq_len"
    ):
        calibration_set(tiny_tokenizer(), spec, seq_len=30)
    with pytest.raises(
        UserError, match=r"has 100 tokens, but 32 sequences of 512 need 16384; lower samples or seq_len"
    ):
        calibration_set(tiny_tokenizer(), spec)
    with pytest.raises(UserError, match=r"has 100 tokens, but one window of 102 needs 101; lower window"):
        evaluation_windows(tiny_tokenizer(bos=True), spec, window=102)
    assert calibration_set(tiny_tokenizer(), spec, samples=3, seq_len=30).input_ids.shape == (3, 30)
    assert evaluation_windows(tiny_tokenizer(bos=True), spec, window=101).input_ids.shape == (1, 101)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"seq_len": 1}, "seq_len is 1; at least 2"),
        ({"seq_len": -5}, "seq_len is -5"),
    ],
)
def test_sizes_that_make_no_sequences_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibration_set(tiny_tokenizer(), "pydoc", **arguments)


@pytest.mark.parametrize(
    ("window", "most", "message"), [(1, None, "window is 1; at least 2"), (8, 0, "max_windows is 0")]
)
def test_sizes_that_make_no_windows_are_refused(window: int, most: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluation_windows(tiny_tokenizer(), "pydoc", window=window, max_windows=most)
