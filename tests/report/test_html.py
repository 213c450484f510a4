"""``report.html``: what it says, that it escapes, and that it needs nothing but itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from checkpoints import QUICK, SMALL, run_cli
from html_pages import Page, page_of
from tiny_models import Tiny, save_tiny, tiny_model

from sglp_llm.method.selection import lowest_scores
from sglp_llm.plan import load_plan
from sglp_llm.sizes import show_count

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_model(Tiny("llama", 0)), tmp_path_factory.mktemp("source") / "tiny")


def test_a_pruned_checkpoint_with_scores(source: Path, tmp_path: Path) -> None:
    assert run_cli("prune", source, "-o", tmp_path / "out", "--drop", 2, *QUICK, "--also", "bi").code == 0
    plan, page = load_plan(tmp_path / "out"), page_of(tmp_path / "out")
    layers = page.all("li")
    assert [index for index, each in enumerate(layers) if "removed" in (each["class"] or "")] == list(plan.removed)
    assert plan.similarity is not None
    for row in range(6):
        for column in range(6):
            assert f"layers {row} and {column}: CKA {plan.similarity.values[row, column]:.4f}" in page.text
    for name, values in plan.scores.items():
        assert f"Score: {name}" in page.text
        for layer, value in enumerate(values):
            assert f"layer {layer}: {value:.6g}" in page.text
    (slider,) = page.all("input")
    choices = json.loads(str(slider["data-choices"]))
    assert choices[2][0] == list(plan.removed)
    assert plan.footprint is not None
    for count, (chosen, left) in enumerate(choices):
        assert chosen == sorted(lowest_scores(count, plan.segments, plan.scores["gradnorm"]))
        assert left == f"{show_count(plan.footprint.params_without(chosen))} parameters stay"
    assert "sglp-llm prune --recipe sglp_recipe.yaml" in page.text
    assert str(tmp_path) not in page.text


def test_a_trained_checkpoint(source: Path, tmp_path: Path) -> None:
    options = ("--drop", 2, *SMALL, "--trial-samples", 2, "--heal-tokens", 512)
    assert run_cli("prune", source, "-o", tmp_path / "out", *options).code == 0
    page = page_of(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "sglp_healing.json").read_text())
    for name in ("divergence", "next_token_loss"):
        for end in ("before", "after"):
            assert f"{record[end][name]:.4f}" in page.text
    assert "Held-out loss" in page.text
    assert "CKA" in page.text
    assert "The search" in page.text


def test_analyze_and_the_verb_write_it(source: Path, tmp_path: Path) -> None:
    assert run_cli("analyze", source, "-o", tmp_path / "out", "--drop", 1, *QUICK).code == 0
    written = (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "out" / "report.html").unlink()
    outcome = run_cli("report", tmp_path / "out")
    assert outcome.code == 0
    assert str(tmp_path / "out" / "report.html") in outcome.out
    assert (tmp_path / "out" / "report.html").read_text() == written
    assert "no sglp_plan.json" in run_cli("report", source).error


def test_nothing_is_fetched_and_everything_is_escaped(source: Path, tmp_path: Path) -> None:
    assert run_cli("analyze", source, "-o", tmp_path / "out", "--drop", 1, *QUICK).code == 0
    file = tmp_path / "out" / "sglp_plan.json"
    plan = json.loads(file.read_text())
    plan["source"]["name"] = EVIL
    plan["settings"] |= {EVIL: EVIL, "search": {"races": [{"race": EVIL, "sequences": EVIL, "costs": [[EVIL, 1.0]]}]}}
    plan["compensation"] = {"method": EVIL, "losses": {"held_out": {"without": 2.0, "with": 1.0}}}
    plan["versions"][EVIL] = EVIL
    plan["scores"][EVIL] = [0.0] * 6
    file.write_text(json.dumps(plan))
    assert run_cli("report", tmp_path / "out").code == 0
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert EVIL not in text
    assert page.text.count(EVIL) > 8
    assert len(page.all("script")) == 1
    for tag, attributes in page.elements:
        assert not {"src", "href", "onload", "onclick"} & set(attributes), (tag, attributes)
    assert not re.findall(r"url\(|@import|https?://", text)


@pytest.mark.parametrize("odd", [{"search": 3}, {"search": {"races": "x"}}, {"scored_by": []}, {"protect": None}])
def test_settings_of_another_program(odd: dict[str, object], source: Path, tmp_path: Path) -> None:
    (tmp_path / "sglp_plan.json").write_text(json.dumps({"num_layers": 6, "removed": [2], "settings": odd}))
    assert run_cli("report", tmp_path).code == 0
    assert "1 of 6 decoder layers removed: 2" in page_of(tmp_path).text
    assert "The plan holds no CKA matrix." in page_of(tmp_path).text


def test_plots_of_an_analysis(source: Path, tmp_path: Path) -> None:
    from matplotlib import image

    assert run_cli("analyze", source, "-o", tmp_path / "out", "--drop", 2, *QUICK).code == 0
    for name in ("cka.png", "scores.png"):
        pixels = image.imread(tmp_path / "out" / name)[..., :3]
        assert min(pixels.shape[:2]) > 300
    # The frames of removed layers are the only red in the drawing of the matrix.
    red = image.imread(tmp_path / "out" / "cka.png")
    assert ((red[..., 0] > 0.9) & (red[..., 1] < 0.2) & (red[..., 2] < 0.2)).any()
