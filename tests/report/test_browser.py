"""The report in a browser: no error, no request, its controls work, and nothing keeps a reader out who cannot see or point."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import QUICK, run_cli
from tiny_models import Tiny, save_tiny, tiny_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("reports")
    source = save_tiny(tiny_model(Tiny("llama", 0)), place / "tiny")
    assert run_cli("analyze", source, "-o", place / "layers", "--drop", 2, *QUICK).code == 0
    measures = ("--eval", "pydoc", "--window", 16, "--max-windows", 4, "--calibration", "pydoc")
    command = (
        "compare",
        source,
        "--criteria",
        "bi,magnitude",
        "--drops",
        1,
        "--samples",
        2,
        "--seq-len",
        16,
        *measures,
    )
    assert run_cli(*command, "-o", place / "methods").code == 0
    return {name: place / name / "report.html" for name in ("layers", "methods")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield opened
        opened.close()


def opened(browser: Any, file: Path, **context: Any) -> tuple[Any, list[str]]:
    """A page, and a list that collects its errors and its requests for anything but itself."""
    page = browser.new_context(**context).new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url == file.as_uri() else wrong.append(request.url))
    page.goto(file.as_uri())
    return page, wrong


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["layers", "methods"])
def test_nothing_is_wrong(browser: Any, reports: dict[str, Path], name: str, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page, wrong = opened(browser, reports[name], viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = [
        (each["id"], [node["html"][:200] for node in each["nodes"]][:3])
        for each in axe.run(page).response["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    assert (found, wrong) == ([], [])


def test_pointing_at_a_cell_names_it(browser: Any, reports: dict[str, Path]) -> None:
    page, wrong = opened(browser, reports["layers"])
    cell = page.locator("svg[data-shown=cka-shown] rect").nth(8)
    cell.hover()
    assert page.locator("#cka-shown").text_content() == cell.locator("title").text_content()
    assert wrong == []


def test_the_slider_shows_other_choices(browser: Any, reports: dict[str, Path]) -> None:
    page, wrong = opened(browser, reports["layers"])
    for count in (0, 1, 3):
        page.locator("#choice").fill(str(count))
        assert page.locator(".layers li.removed").count() == count
        assert f"{count} of 6 layers would go" in page.locator("#chosen").text_content()
    assert wrong == []


def test_a_column_sorts_the_methods(browser: Any, reports: dict[str, Path]) -> None:
    page, wrong = opened(browser, reports["methods"])
    column = "table.sortable tbody tr:not(.fixed) td:nth-child(2)"
    for _ in range(2):
        page.locator("table.sortable th button").first.click()
        numbers = [float(text.split()[0].replace(",", "")) for text in page.locator(column).all_text_contents()]
        order = page.locator("table.sortable th[aria-sort]").get_attribute("aria-sort")
        assert numbers == sorted(numbers, reverse=order == "descending")
    page.locator("svg[data-shown^=dots] circle").first.hover()
    assert ":" in page.locator("[id^=dots]").first.text_content()
    assert wrong == []
