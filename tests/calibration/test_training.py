"""Training sequences against packing in a straight line: everything joined, tokenised at once and cut."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from sglp_llm.calibration import load_documents, packing
from sglp_llm.calibration.training import NOT_PREDICTED, training_sequences
from sglp_llm.errors import UserError
from sglp_llm.progress import Advance

CHATML = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def put_in_order(things: list[Any], seed: int) -> list[Any]:
    """What one shuffle with a generator of its own makes of a list."""
    ordered = list(things)
    random.Random(seed).shuffle(ordered)
    return ordered


def packed(ids: list[int], seq_len: int, bos: bool, front: int = 0) -> list[list[int]]:
    body = seq_len - bos
    return [[front] * bos + ids[start : start + body] for start in range(0, len(ids) - body + 1, body)]


def write_rows(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file, rng = tmp_path_factory.mktemp("texts") / "texts.jsonl", random.Random(3)
    write_rows(file, [{"text": "".join(rng.choices("etaoin shrdlu\n", k=rng.randrange(5, 200)))} for _ in range(60)])
    return f"jsonl:{file}:text"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"answer {n} " * 3}]}
        for n in range(40)
    ]
    write_rows(file, rows)
    return f"chat:{file}"


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 1500), seq_len=st.integers(2, 70), seed=st.integers(0, 3), bos=st.booleans())
def test_text_is_packed_in_a_straight_line(texts: str, tokens: int, seq_len: int, seed: int, bos: bool) -> None:
    data = training_sequences(tiny_tokenizer(bos), texts, tokens=tokens, seq_len=seq_len, seed=seed)
    documents = put_in_order(list(load_documents(texts, "train")), seed)
    count = -(-tokens // seq_len)
    windows = packed(tiny_tokenizer()("\n\n".join(documents))["input_ids"], seq_len, bos)[:count]
    assert data.input_ids.tolist() == put_in_order(windows, seed)
    assert (data.input_ids.dtype, data.labels.dtype) == (torch.int64, torch.int64)
    assert torch.equal(data.labels, data.input_ids)
    assert data.source == texts


def by_hand(n: int, template: bool) -> list[tuple[str, bool]]:
    """A conversation of `chats`, as pieces of text that are an answer or not."""
    answer = f"answer {n} " * 3
    if template:
        return [(f"<user>\nask {n}</s>\n<assistant>\n", False), (f"{answer}</s>\n", True)]
    sentence = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    return [(f"{sentence}\n\n### Instruction:\nask {n}\n\n### Response:\n", False), (answer, True)]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [False, True])
def test_of_conversations_only_the_answers_are_predicted(chats: str, template: bool, bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos)
    tokenizer.chat_template = CHATML if template else None
    ids: list[int] = []
    labels: list[int] = []
    for place, number in enumerate(put_in_order(list(range(40)), 0)):
        # No token of this tokenizer crosses the borders between these pieces.
        for text, is_answer in [("\n\n", False)] * (place > 0) + by_hand(number, template):
            piece = tiny_tokenizer()(text)["input_ids"]
            ids += piece
            labels += piece if is_answer else [NOT_PREDICTED] * len(piece)
    pairs = zip(packed(ids, 64, bos), packed(labels, 64, bos, NOT_PREDICTED), strict=True)
    both = [pair for pair in pairs if set(pair[1][1:]) != {NOT_PREDICTED}][:20]
    data = training_sequences(tokenizer, chats, tokens=20 * 64, seq_len=64)
    expected = put_in_order(both, 0)
    assert data.input_ids.tolist() == [row for row, _ in expected]
    assert data.labels.tolist() == [row for _, row in expected]
    everything = training_sequences(tokenizer, chats, tokens=20 * 64, seq_len=64, answers_only=False)
    assert everything.input_ids.tolist() == put_in_order(packed(ids, 64, bos)[:20], 0)
    assert torch.equal(everything.labels, everything.input_ids)


def test_a_sequence_in_which_nothing_would_be_predicted_is_left_out(tmp_path: Path) -> None:
    rows = [{"instruction": "x" * 300, "output": "yes"}, {"instruction": "y", "output": "no " * 60}]
    write_rows(tmp_path / "a", rows)
    data = training_sequences(tiny_tokenizer(), f"chat:{tmp_path}/a", tokens=None, seq_len=16)
    whole = training_sequences(tiny_tokenizer(), f"chat:{tmp_path}/a", tokens=None, seq_len=16, answers_only=False)
    assert bool((data.labels[:, 1:] != NOT_PREDICTED).any(dim=1).all())
    assert 0 < len(data.input_ids) < len(whole.input_ids)
    rows = [{"messages": [{"role": "user", "content": "z" * 300}]}]
    write_rows(tmp_path / "b", rows)
    with pytest.raises(UserError, match="but of 2 sequences of 16 only 0 have a token to predict; ask"):
        training_sequences(tiny_tokenizer(), f"chat:{tmp_path}/b", tokens=32, seq_len=16)


@pytest.mark.parametrize("limits", [(1, 10**6), (100, 10**6), (100, 150)])
def test_a_stream_has_the_tokens_of_the_whole_text(
    limits: tuple[int, int], texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_tokenizer()("\n\n".join(load_documents(texts, "train")))["input_ids"]
    for name, limit in zip(("STREAM_CHARACTERS", "PIECE_CHARACTERS"), limits, strict=True):
        monkeypatch.setattr(packing, name, limit)
    pieces = list(packing.token_stream(tiny_tokenizer(), load_documents(texts, "train")))
    assert len(pieces) > 10
    # Tokens may differ at the seams; the text they stand for may not.
    assert tiny_tokenizer().decode([token for piece in pieces for token in piece]) == tiny_tokenizer().decode(whole)


def test_reading_stops_when_there_is_enough(
    texts: str, chats: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packing, "POOL_DOCUMENTS", 5)
    monkeypatch.setattr(packing, "STREAM_CHARACTERS", 500)
    for spec in (texts, chats):
        form, file, *field = spec.split(":")
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        damaged = tmp_path / form
        damaged.write_text("\n".join([*lines[:30], "this line is damaged"]), encoding="utf-8")
        spec = ":".join([form, str(damaged), *field])
        assert len(training_sequences(tiny_tokenizer(), spec, tokens=300, seq_len=16).input_ids) == 19
        with pytest.raises(UserError, match="line 31: not JSON"):
            training_sequences(tiny_tokenizer(), spec, tokens=100_000, seq_len=16)


def test_too_little_text_says_how_much_there_is(tmp_path: Path) -> None:
    def shape(tokens: int | None, seq_len: int = 16) -> tuple[int, ...]:
        data = training_sequences(tiny_tokenizer(), f"text:{tmp_path}/a", tokens=tokens, seq_len=seq_len)
        return tuple(data.input_ids.shape)

    (tmp_path / "a").write_text("b" * 100)
    with pytest.raises(UserError, match=r"a: the text has 100 tokens, but 7 sequences of 16 need 112; ask for fewer"):
        shape(110)
    with pytest.raises(UserError, match=r"fewer tokens \(at most 96\) or shorter sequences, or give more text$"):
        shape(97)
    assert shape(96) == shape(None) == (6, 16)
    with pytest.raises(
        UserError, match=r"100 tokens, but 1 sequence of 101 needs 101; ask for fewer tokens or shorter"
    ):
        shape(None, 101)


def test_a_mixture_shares_the_tokens_and_each_source_gives_what_it_gives_alone(texts: str, chats: str) -> None:
    mixed = training_sequences(tiny_tokenizer(), f"{texts}:3 {chats}", tokens=16 * 32, seq_len=32, seed=1)
    alone = [
        training_sequences(tiny_tokenizer(), spec, tokens=count * 32, seq_len=32, seed=1)
        for spec, count in ((texts, 12), (chats, 4))
    ]
    rows = [
        (ids, labels)
        for each in alone
        for ids, labels in zip(each.input_ids.tolist(), each.labels.tolist(), strict=True)
    ]
    found = list(zip(mixed.input_ids.tolist(), mixed.labels.tolist(), strict=True))
    assert sorted(found) == sorted(rows)
    assert found != rows
    assert mixed.source == f"{texts}:3 {chats}"
    with pytest.raises(UserError, match="a mixture needs a number of tokens to share; give one"):
        training_sequences(tiny_tokenizer(), f"{texts} {chats}", tokens=None, seq_len=32)


def test_the_same_on_every_machine(texts: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "a", [{"instruction": f"add {n}", "output": f"{n} " * 9} for n in range(20)])
    data = training_sequences(tiny_tokenizer(), f"chat:{tmp_path}/a", tokens=128, seq_len=32)
    assert data.hash == "f84db4306791b351439fc04543c04f5be689404cfe39744d05cae90dd49ed26c"
    torch.manual_seed(5)
    random.seed(5)
    first, again = (training_sequences(tiny_tokenizer(), texts, tokens=128, seq_len=8, seed=7) for _ in range(2))
    other = training_sequences(tiny_tokenizer(), texts, tokens=128, seq_len=8, seed=8)
    assert first.hash == again.hash != other.hash


def test_what_a_model_wrote_stands_in_a_file(tmp_path: Path, texts: str) -> None:
    file = Path(texts.split(":")[1])
    own = training_sequences(tiny_tokenizer(), "self", tokens=64, seq_len=16, self_file=file)
    assert own.source == "self"
    assert own.hash == training_sequences(tiny_tokenizer(), texts, tokens=64, seq_len=16).hash
    with pytest.raises(UserError, match="self is text that a model writes, and no model writes"):
        training_sequences(tiny_tokenizer(), "self", tokens=64, seq_len=16)


def test_progress_reaches_its_total(texts: str) -> None:
    done: list[tuple[str, int, list[int]]] = []

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Advance]:
        done.append((description, total, []))
        yield done[-1][2].append

    training_sequences(tiny_tokenizer(), texts, tokens=1000, seq_len=16, progress=progress)
    ((description, total, steps),) = done
    assert (description, total, sum(steps)) == ("Reading", 1008, 1008)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tokens": 0}, "tokens is 0; at least 1"), ({"seq_len": 1}, "seq_len is 1; at least 2 tokens")],
)
def test_sizes_that_make_no_sequences_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        training_sequences(tiny_tokenizer(), "pydoc", **{"tokens": 10, "seq_len": 8, **arguments})
