"""Several sources at once: how they are written, how they share, and that each gives what it gives alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from helpers import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from sglp_llm.calibration import Portion, calibration_set, check_spec, evaluation_windows, mixture
from sglp_llm.calibration.mixtures import interleaved, shares
from sglp_llm.calibration.texts import source_label
from sglp_llm.errors import UserError

WEIGHTS = st.lists(st.decimals("0.1", "50", places=1), min_size=1, max_size=6)


def written(spec: str) -> list[tuple[str, str]]:
    return [(portion.source, str(portion.weight)) for portion in mixture(spec)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    rng = random.Random(1)
    lines = [json.dumps({"text": "".join(rng.choices("etaoin shrdlu", k=120)), "2": "two" * 50}) for _ in range(100)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


# How they are written


def test_sources_are_separated_by_spaces_and_a_number_at_the_end_is_a_weight() -> None:
    assert written("wikitext2") == [("wikitext2", "1")]
    assert written("wikitext2:1  c4:0.5 self:2") == [("wikitext2", "1"), ("c4", "0.5"), ("self", "2")]
    assert written(" wikitext2:train:2\tpydoc:test") == [("wikitext2:train", "2"), ("pydoc:test", "1")]
    assert written("jsonl:/a.jsonl:text:3 text:/b.txt:10") == [("jsonl:/a.jsonl:text", "3"), ("text:/b.txt", "10")]


def test_what_was_taken_apart_is_given_back() -> None:
    portions = (Portion("text:a file with spaces:2"), Portion("c4", Decimal(2)))
    assert mixture(portions) == mixture(list(portions)) == portions


def test_a_number_that_is_part_of_a_name_is_no_weight(tmp_path: Path, rows: Path) -> None:
    for name in ("a:2", "a", "b:c.jsonl"):
        (tmp_path / name).write_text('{"2": "x"}')
    assert written(f"text:{tmp_path}/a:2") == [(f"text:{tmp_path}/a:2", "1")]
    assert written(f"text:{tmp_path}/a:3") == [(f"text:{tmp_path}/a", "3")]
    assert written(f"jsonl:{rows}:2") == [(f"jsonl:{rows}:2", "1")]
    assert written("jsonl:/not/there:2") == [("jsonl:/not/there:2", "1")]
    assert written(f"jsonl:{rows}:2:3") == [(f"jsonl:{rows}:2", "3")]
    assert written(f"jsonl:{tmp_path}/b:c.jsonl:2") == [(f"jsonl:{tmp_path}/b:c.jsonl:2", "1")]


def test_one_file_may_have_spaces_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "my own c4.txt").write_text("a text " * 50)
    one = f"text:{tmp_path}/my own c4.txt"
    assert written(one) == [(one, "1")]
    (tmp_path / "b c4").write_text("a text")  # its name reads like a mixture
    assert written(f"text:{tmp_path}/b c4") == [(f"text:{tmp_path}/b c4", "1")]
    check_spec(one)
    assert source_label(one, "train") == one
    assert calibration_set(tiny_tokenizer(), one, samples=2, seq_len=16).source == one
    with pytest.raises(UserError, match=r"not my file.txt: there is no such file"):
        check_spec(f"text:{tmp_path}/not my file.txt")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wikitext2 c44:2", "unknown calibration set 'c44'; did you mean 'c4'?"),
        ("wikitext2 c4:dev", "unknown split of c4 'dev'"),
        ("wikitext2:0 c4", "'wikitext2:0': a weight must be positive"),
        ("wikitext2:0.0", "'wikitext2:0.0': a weight must be positive"),
        ("wikitext2:-1 c4", "unknown split of wikitext2 '-1'"),
        ("c4 self:train", "'self:train': what the model writes itself has no splits"),
        ("c4 c4:train:2", "names c4:train twice; give it one weight, such as c4:train:2"),
        ("c4 pydoc jsonl:a", "'jsonl:a' does not name a file and a field"),
        ("c4 text:/not/there:2", "/not/there: there is no such file"),
    ],
)
def test_what_is_wrong_with_a_mixture(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_spec(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_results_name_every_source_with_its_split_and_weight() -> None:
    label = source_label("wikitext2:3 self:2 text:/a.txt:0.5 pydoc:test", "train")
    assert label == "wikitext2:train:3 self:2 text:/a.txt:0.5 pydoc:test"
    assert source_label(label, "train") == label
    assert source_label("wikitext2:3", "train") == "wikitext2:train"  # alone it has everything


# How they share


def test_shares_are_by_largest_remainder() -> None:
    def of(spec: str, total: int) -> list[int]:
        return shares(mixture(spec), total)

    assert of("wikitext2:1 c4:1 self:2", 32) == [8, 8, 16]
    assert of("wikitext2 c4 self", 32) == [11, 11, 10]
    assert of("wikitext2:0.1 c4:0.2", 30) == [10, 20]
    assert of("wikitext2:100 c4", 4) == [4, 0]


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 500))
def test_every_share_is_within_one_of_what_is_due(weights: list[Decimal], total: int) -> None:
    found = shares([Portion(str(number), weight) for number, weight in enumerate(weights)], total)
    due = [total * Fraction(weight) / Fraction(sum(weights)) for weight in weights]
    assert sum(found) == total
    assert all(abs(share - exact) < 1 for share, exact in zip(found, due, strict=True))


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 5))
def test_interleaving_keeps_every_thing_once_and_each_source_in_order(counts: list[int], seed: int) -> None:
    places = interleaved(counts, seed)
    assert sorted(places) == list(range(sum(counts)))
    start = 0
    for count in counts:
        assert [place for place in places if start <= place < start + count] == list(range(start, start + count))
        start += count
    assert places == interleaved(counts, seed)


# What they give


def test_each_source_gives_the_sequences_that_it_gives_alone(rows: Path) -> None:
    tokenizer, other = tiny_tokenizer(bos=True), f"jsonl:{rows}:text"
    mixed = calibration_set(tokenizer, f"pydoc:1 {other}:3", samples=12, seq_len=32, seed=5)
    alone = [
        calibration_set(tokenizer, spec, samples=samples, seq_len=32, seed=5).input_ids.tolist()
        for spec, samples in (("pydoc", 3), (other, 9))
    ]
    assert mixed.input_ids.shape == (12, 32)
    found = mixed.input_ids.tolist()
    assert [row for row in found if row in alone[0]] == alone[0]
    assert [row for row in found if row in alone[1]] == alone[1]
    assert found not in (alone[0] + alone[1], alone[1] + alone[0])
    assert mixed.source == f"pydoc:train {other}:3"
    assert bool(mixed.mask.all())


def test_another_seed_gives_another_order(rows: Path) -> None:
    def ids(seed: int) -> list[list[int]]:
        spec = f"pydoc jsonl:{rows}:text"
        return calibration_set(tiny_tokenizer(), spec, samples=16, seq_len=8, seed=seed).input_ids.tolist()

    assert ids(0) == ids(0) != ids(1)


def test_one_source_with_a_weight_is_that_source(rows: Path) -> None:
    plain, weighted = (
        calibration_set(tiny_tokenizer(), spec, samples=4, seq_len=16)
        for spec in (f"jsonl:{rows}:text", f"jsonl:{rows}:text:7")
    )
    assert (plain.source, plain.hash) == (weighted.source, weighted.hash)
    assert torch.equal(plain.input_ids, weighted.input_ids)


def test_a_source_without_a_share_is_not_read(rows: Path) -> None:
    data = calibration_set(tiny_tokenizer(), f"pydoc:9 jsonl:{rows}:absent", samples=3, seq_len=8)
    assert data.hash == calibration_set(tiny_tokenizer(), "pydoc", samples=3, seq_len=8).hash


def test_too_little_text_in_one_source_names_it_and_its_share(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("b" * 100)
    message = (
        r"short: the text has 100 tokens, but its 8 of the 16 sequences of 32 need 256; lower samples, its weight or"
    )
    with pytest.raises(UserError, match=message):
        calibration_set(tiny_tokenizer(), f"pydoc text:{tmp_path}/short", samples=16, seq_len=32)


def test_perplexity_is_measured_on_one_text() -> None:
    with pytest.raises(UserError, match="wikitext2:test c4:test:2 is a mixture, and perplexity is measured on one"):
        evaluation_windows(tiny_tokenizer(), "wikitext2 c4:2", window=8)
    weighted = evaluation_windows(tiny_tokenizer(), "pydoc:2", window=8, max_windows=2)
    assert weighted.source == "pydoc:test"


def test_self_is_known_but_not_there_to_be_read() -> None:
    check_spec("self")
    assert source_label("self", "train") == "self"
    for read in (
        lambda: calibration_set(tiny_tokenizer(), "self"),
        lambda: evaluation_windows(tiny_tokenizer(), "self", window=8),
    ):
        with pytest.raises(UserError, match="self is text that a model writes, and no model writes"):
            read()


def test_the_order_is_as_likely_to_begin_with_either() -> None:
    first = Counter(interleaved([8, 8], seed)[0] for seed in range(200))
    assert 70 < first[0] < 130
