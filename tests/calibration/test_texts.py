"""Documents from files, from the standard library and (with the Hub replaced by a small real data set) from the Hub."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pytest
from helpers import ROOT

from sglp_llm.calibration import check_spec, load_documents
from sglp_llm.calibration.corpora import CORPORA
from sglp_llm.calibration.specs import FILE_FORMS, SELF
from sglp_llm.calibration.texts import source_label
from sglp_llm.errors import UserError


def read(spec: str, split: Any = "train") -> list[str]:
    return list(load_documents(spec, split))


def refusal(spec: str) -> str:
    """What reading the source says; whatever `check_spec` says too must be the same."""
    with pytest.raises(UserError) as caught:
        read(spec)
    message = str(caught.value)
    assert "\n" not in message
    early = message
    try:
        check_spec(spec)
    except UserError as error:
        early = str(error)
    assert early.split(",")[0] == message.split(",")[0]
    return message


# Files


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_text_file_is_one_document(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"with:colons and spaces.txt{ending}"
    data = "\ufeffFirst line, Zürich.\r\n\r\nSecond.\n".encode()
    file.write_bytes(gzip.compress(data) if ending else data)
    check_spec(f"text:{file}")
    assert read(f"text:{file}") == read(f"text:{file}", "test") == ["First line, Zürich.\n\nSecond.\n"]
    assert source_label(f"text:{file}", "test") == f"text:{file}"


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_every_line_of_a_jsonl_file_is_a_document(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a:b.jsonl{ending}"
    rows = [{"id": 1, "body": "one\ntwo"}, {"body": "  "}, {"body": "Zürich \U0001f600"}]
    data = ("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n").encode()
    file.write_bytes(gzip.compress(data) if ending else data)
    check_spec(f"jsonl:{file}:body")
    assert read(f"jsonl:{file}:body") == ["one\ntwo", "Zürich \U0001f600"]
    assert source_label(f"jsonl:{file}:body", "train") == f"jsonl:{file}:body"


def test_a_jsonl_file_is_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"t": "good"}\nbad\n')
    documents = load_documents(f"jsonl:{file}:t", "train")
    assert next(documents) == "good"
    check_spec(f"jsonl:{file}:t")
    with pytest.raises(UserError, match="line 2: not JSON"):
        next(documents)


def test_the_home_folder_may_be_abbreviated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert read("text:~/a.txt") == ["at home"]


def test_an_absent_file_and_a_folder(tmp_path: Path) -> None:
    for form in (f"text:{tmp_path}/no.txt", f"text:{tmp_path}/no.txt.gz"):
        assert "no such file" in refusal(form)
    (tmp_path / "folder.gz").mkdir()
    assert refusal(f"text:{tmp_path}") == f"{tmp_path}: this is a folder, not a file"
    assert "this is a folder" in refusal(f"text:{tmp_path}/folder.gz")
    assert "this is a folder" in refusal(f"jsonl:{tmp_path}:text")
    (tmp_path / "file").write_text("x")
    assert "cannot read the file (Not a directory)" in refusal(f"text:{tmp_path}/file/below")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_an_empty_file(tmp_path: Path, content: bytes, ending: str) -> None:
    file = tmp_path / f"empty{ending}"
    file.write_bytes(gzip.compress(content) if ending else content)
    assert refusal(f"text:{file}").startswith(f"{file}: the file is empty")
    assert refusal(f"jsonl:{file}:text").startswith(f"{file}: the file is empty")
    with pytest.raises(UserError, match="the file is empty"):
        check_spec(f"jsonl:{file}:text")


def test_a_field_that_is_always_empty(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"t": ""}\n{"t": " "}\n')
    assert "every 't' in it is" in refusal(f"jsonl:{file}:t")


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "latin1"
    file.write_bytes("ok\nZürich".encode("latin-1"))
    assert refusal(f"text:{file}") == f"{file}: not UTF-8 text: byte 0xfc at offset 4"
    file.write_bytes(b"\xef\xbb\xbfab\xff")
    assert refusal(f"text:{file}").endswith("byte 0xff at offset 5")
    file.write_bytes(b'{"t": "a"}\n{"t": "\xfc"}\n')
    assert refusal(f"jsonl:{file}:t") == f"{file}, line 2: not UTF-8 text: byte 0xfc at position 7"


@pytest.mark.parametrize("form", ["text:{}", "jsonl:{}:t"])
def test_a_damaged_gzip_file(tmp_path: Path, form: str) -> None:
    file = tmp_path / "a.jsonl.gz"
    spec = form.format(file)
    rows = "".join(json.dumps({"t": f"{number * 7919 % 10007} some text"}) + "\n" for number in range(2000))
    good = gzip.compress(rows.encode())
    middle = len(good) // 2
    damaged = {
        "truncated": good[:middle],
        "wrong checksum": good[:-8] + bytes(4) + good[-4:],
        "not gzip": rows.encode(),
    }
    for what, data in damaged.items():
        file.write_bytes(data)
        assert refusal(spec).startswith(f"{file}: damaged, or not a gzip file ("), what
    # Overwritten bytes may still decompress, to lines that are wrong before the checksum is reached.
    file.write_bytes(good[:middle] + b"\xff" * 64 + good[middle + 64 :])
    assert refusal(spec).startswith(str(file))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"u": 1, "id": 2}', "there is no field 't'; the fields are 'u', 'id'"),
        ("{}", "there is no field 't'; the fields are none"),
        ('["t"]', "expected a JSON object, not list"),
        ("null", "expected a JSON object, not NoneType"),
        ('{"t": 3}', "field 't' must be text, not int"),
        ('{"t": ["a"]}', "field 't' must be text, not list"),
        ('{"t": "a"', "not JSON (Expecting ',' delimiter at column 10)"),
        ("[" * 100_000, "not JSON ("),
        ('{"t": ' + "1" * 5000 + "}", "not JSON ("),
        (r'{"t": "\ud800"}', "field 't' holds half of a surrogate pair, which is not text"),
    ],
)
@pytest.mark.parametrize("before", [0, 2])
def test_a_line_that_is_wrong(tmp_path: Path, line: str, message: str, before: int) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"t": "good"}\n' * before + line + "\n")
    assert refusal(f"jsonl:{file}:t").startswith(f"{file}, line {before + 1}: {message}")


# Specifications


@pytest.mark.parametrize("spec", ["pydoc", "pydoc:test", "wikitext2", "c4:train", "alpaca", "bookcorpus:test"])
def test_names_are_checked_without_reaching_the_hub(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(datasets, "load_dataset")
    check_spec(spec)
    assert source_label(spec, "train") == (spec if ":" in spec else f"{spec}:train")


@pytest.mark.parametrize("spec", ["wikitext", "", "corpus.txt", "C4"])
def test_an_unknown_name_lists_every_form(spec: str) -> None:
    message = refusal(spec)
    assert message.startswith(f"unknown calibration set {spec!r}")
    assert message.endswith(
        "Known: alpaca, bookcorpus, c4, chat:FILE, fineweb-edu, jsonl:FILE:FIELD, pydoc, self, text:FILE, wikitext103, wikitext2"
    )


def test_the_page_on_calibration_text_has_every_form() -> None:
    page = (ROOT / "docs" / "calibration-text.md").read_text(encoding="utf-8")
    forms = {*CORPORA, *FILE_FORMS.values(), SELF}
    assert {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")} == forms


def test_an_unknown_split_and_a_form_that_is_incomplete() -> None:
    assert refusal("wikitext2:validation").startswith("unknown split of wikitext2 'validation'")
    assert "unknown split" in refusal("pydoc:")
    for spec in ("text", "text:"):
        assert refusal(spec) == f"{spec!r} names no file; write text:FILE"
    for spec in ("jsonl", "jsonl:a.jsonl", "jsonl:a.jsonl:", "jsonl::text"):
        assert refusal(spec) == f"{spec!r} does not name a file and a field; write jsonl:FILE:FIELD"


# The standard library


def test_pydoc_is_the_topics_in_order_without_and_with_every_fifth() -> None:
    every = [topics[name] for name in sorted(topics)]
    assert read("pydoc", "test") == every[4::5]
    assert read("pydoc", "train") == [text for number, text in enumerate(every) if number % 5 != 4]
    assert read("pydoc:test", "train") == read("pydoc", "test")


# The Hub


Calls = list[tuple[str, dict[str, Any]]]


def serve(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, str]]) -> Calls:
    """Stands in for the Hub; like it, an iterable data set where streaming is asked for."""
    calls: Calls = []

    def load_dataset(path: str, **arguments: Any) -> object:
        calls.append((path, arguments))
        data = datasets.Dataset.from_list(rows)
        return data.to_iterable_dataset() if arguments.get("streaming") else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_wikitext2_is_cut_into_articles_that_join_to_the_published_text(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        "",
        " = One = \n",
        "",
        " Text . \n",
        " = = Part = = \n",
        "",
        " More = text \n",
        "",
        " = Two : b = \n",
        " Last \n",
    ]
    calls = serve(monkeypatch, [{"text": row} for row in rows])
    articles = read("wikitext2")
    assert calls == [("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "train"})]
    assert [article.split("=")[1] for article in articles] == [" One ", " Two : b "]
    assert "\n\n".join(articles) == "\n\n".join(rows)
    read("wikitext2", "test")
    assert calls[-1][1]["split"] == "test"


def test_c4_reads_one_shard_of_either_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = serve(monkeypatch, [{"text": "page one", "url": "u"}, {"text": "page two", "url": "v"}])
    assert read("c4", "train") == read("c4", "test") == ["page one", "page two"]
    assert [call[0] for call in calls] == ["allenai/c4"] * 2
    assert [call[1]["data_files"] for call in calls] == [
        {"train": "en/c4-train.00000-of-01024.json.gz"},
        {"test": "en/c4-validation.00000-of-00008.json.gz"},
    ]
    assert [call[1]["split"] for call in calls] == ["train", "test"]


def test_alpaca_is_put_in_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": f"do {n}", "input": "" if n % 2 else "{this}", "output": f"did {n}"} for n in range(20)]
    serve(monkeypatch, rows)
    train, test = read("alpaca", "train"), read("alpaca", "test")
    assert (len(train), len(test)) == (18, 2)
    assert train[0].endswith("### Instruction:\ndo 0\n\n### Input:\n{this}\n\n### Response:\ndid 0")
    assert train[0].startswith("Below is an instruction that describes a task, paired with an input")
    assert train[1].endswith("appropriately completes the request.\n\n### Instruction:\ndo 1\n\n### Response:\ndid 1")
    assert [text.rsplit("\n", 1)[1] for text in test] == ["did 9", "did 19"]


def test_bookcorpus_joins_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = [f"sentence {number} ." for number in range(1300)]
    calls = serve(monkeypatch, [{"text": sentence} for sentence in sentences])
    train, test = read("bookcorpus", "train"), read("bookcorpus", "test")
    assert calls[0] == ("rojagtap/bookcorpus", {"split": "train", "streaming": True})
    assert train[0] == " ".join(sentences[:128])
    assert test == [" ".join(sentences[9 * 128 : 10 * 128])]
    assert train[-1] == " ".join(sentences[10 * 128 :])


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub (LocalEntryNotFoundError)"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'Salesforce/wikitext' doesn't exist\non the Hub"),
        RuntimeError("Dataset scripts are no longer supported, but found wikitext.py"),
    ],
)
def test_a_hub_that_fails_is_one_line_with_a_way_out(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **_: Any) -> object:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal("wikitext2")
    assert message.startswith("wikitext2: cannot read the data set Salesforce/wikitext from the Hugging Face Hub (")
    assert type(error).__name__ in message
    assert message.endswith("without the Hub use text:FILE, jsonl:FILE:FIELD or pydoc")


def test_a_hub_that_fails_in_the_middle_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "first"}
        raise ConnectionError("connection lost")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    documents = load_documents("c4", "train")
    assert next(documents) == "first"
    with pytest.raises(UserError, match=r"c4: cannot read the data set allenai/c4 .*connection lost"):
        next(documents)


def test_a_data_set_whose_columns_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, [{"content": "x"}])
    assert "KeyError: 'text'" in refusal("c4")
