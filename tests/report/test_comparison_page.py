"""The report of a comparison: the numbers of ``compare.json``, in order, with each method's layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import run_cli
from html_pages import Page, page_of
from tiny_models import Tiny, save_tiny, tiny_model

from sglp_llm.report.numbers import shown

SETTINGS = ("--calibration", "pydoc", "--samples", 2, "--seq-len", 16)
MEASURES = ("--eval", "pydoc", "--window", 16, "--max-windows", 4)
METHODS = ("bi", "magnitude", "random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("comparison")
    source = save_tiny(tiny_model(Tiny("llama", 0)), place / "tiny")
    command = ("compare", source, "--criteria", ",".join(METHODS), "--drops", "1,3", *SETTINGS, *MEASURES)
    assert run_cli(*command, "-o", place / "out").code == 0
    return place / "out"


def test_what_a_reader_sees(folder: Path) -> None:
    data, page = json.loads((folder / "compare.json").read_text()), page_of(folder)
    (name,) = data["dense"]
    for row in data["rows"]:
        numbers = row["results"][name]
        assert shown(numbers["log_gap"], numbers["log_gap_standard_error"]) in page.text
        (strip,) = {
            tuple(each.items())
            for each in page.all("svg", role="img")
            if each["aria-label"] == f"{row['method']} removes {' '.join(map(str, row['removed']))}"
        }
        assert strip
    taken = len(page.all("rect", **{"class": "taken"}))
    assert taken == sum(len(row["removed"]) for row in data["rows"])
    assert str(folder.parent) not in (folder / "report.html").read_text()


def test_the_best_method_comes_first(folder: Path) -> None:
    data, text = json.loads((folder / "compare.json").read_text()), page_of(folder).text
    (name,) = data["dense"]
    for count in (1, 3):
        section = text.partition(f"Without {count} layers")[2].partition("dense")[2]
        rows = [row for row in data["rows"] if len(row["removed"]) == count]
        best = sorted(rows, key=lambda row: row["results"][name]["log_gap"])
        places = [section.index(row["method"]) for row in best]
        assert places == sorted(places)


def test_the_verb_writes_it_again(folder: Path) -> None:
    written = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert run_cli("report", folder).code == 0
    assert (folder / "report.html").read_text() == written


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"dense": 3, "rows": []}', "[" * 100_000])
def test_a_damaged_comparison_is_one_line(damage: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(damage)
    outcome = run_cli("report", tmp_path)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "compare.json: " in outcome.err
    assert not (tmp_path / "report.html").exists()


def test_names_are_escaped(folder: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    text = (folder / "compare.json").read_text().replace('"pydoc:test"', json.dumps(evil)).replace("magnitude", evil)
    (tmp_path / "compare.json").write_text(text)
    assert run_cli("report", tmp_path).code == 0
    page = (tmp_path / "report.html").read_text()
    assert "alert(1)" in Page(page).text
    assert evil not in page
