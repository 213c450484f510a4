"""The pages that are made at build time: one a verb, from the command itself; links, and the list for programs."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from command_lines import program
from helpers import ROOT

import sglp_llm

needs_mkdocs = pytest.mark.skipif(find_spec("mkdocs") is None, reason="the extra docs is not installed")


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("verb_pages")


def test_every_verb_has_a_page_with_every_option(pages: ModuleType) -> None:
    made = pages.verb_pages()
    verbs: dict[str, Any] = dict(program().commands)
    assert set(made) == {"index.md", *(f"{name}.md" for name in verbs)}
    for name, verb in verbs.items():
        page = made[f"{name}.md"]
        assert verb.epilog in page
        for parameter in verb.params:
            names = [*parameter.opts, *parameter.secondary_opts]
            if parameter.param_type_name == "option":
                assert all(re.search(rf"[`/,] ?{each}[ `,]", page) for each in names), (name, names)
        rows = [line for line in page.splitlines() if line.startswith("| `")]
        assert len(rows) == len(verb.params)
        assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows), "a cell holds a bar"
        assert f"]({name}.md)" in made["index.md"]


def test_the_pages_that_explain_verbs_exist(pages: ModuleType) -> None:
    for target in pages.READ_ON.values():
        assert (ROOT / "docs" / target.partition("#")[0]).is_file()


def test_the_python_page_has_every_public_name() -> None:
    shown = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.M)
    for path in shown:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__
    assert set(sglp_llm.__all__) <= {path.rpartition(".")[2] for path in shown}


def navigation() -> list[str]:
    """The pages of the navigation, as mkdocs.yml has them."""

    def files(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        nodes = node.values() if isinstance(node, dict) else node
        return [name for each in nodes for name in files(each)]  # type: ignore[attr-defined]

    return files(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])


def test_the_navigation_has_every_page_once() -> None:
    written = {file.name for file in (ROOT / "docs").glob("*.md")}
    made = {"index.md", "contributing.md", "changelog.md", "commands/index.md"}
    made |= {f"commands/{name}.md" for name in program().commands}
    named = navigation()
    assert sorted(named) == sorted(written | made)


@needs_mkdocs
@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    site = tmp_path / "site"
    listed = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(navigation())
    assert all((site / name).is_file() for name in listed)
    assert "sglp_llm.pipeline.prune" in (site / "python" / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'(?:src|href)="(https?://[^"]+)"', (site / "index.html").read_text(encoding="utf-8"))
    assert [link for link in links if link.endswith((".js", ".css")) or "font" in link] == []
