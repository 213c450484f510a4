"""The pages say what is so: command lines parse, blocks run, links lead somewhere."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import run_cli, save_tiny
from command_lines import parse, program
from gguf_files import write_gguf
from helpers import ROOT, TEXT
from pages import PAGES, SHELL, Block, blocks, inline_commands, our_words, run_python, run_shell
from transformers import AutoModelForCausalLM, AutoTokenizer

import sglp_llm
from sglp_llm import criteria
from sglp_llm.adapters import get_adapter
from sglp_llm.evaluation.suites import load_suite
from sglp_llm.plan import load_recipe

ALL = [block for page in PAGES for block in blocks(page)]
RUNNING = [block for block in ALL if block.language in (*SHELL, "python") and not block.why]
PAGES_THAT_RUN = list(dict.fromkeys(block.page for block in RUNNING))

SMALLER = {
    "--tokens 128k": "--tokens 512 --seq-len 32 --sequences 2",
    "tokens=128_000": "tokens=512, seq_len=32, sequences=2",
    "tokens=2_000_000": "tokens=4_000",
    "--limit 50": "--limit 1",
    "limit=200": "limit=1",
    "--ratios 0.1,0.2,0.3": "--ratios 0.1,0.2 --samples 2 --seq-len 32 --max-windows 2 --window 32",
    "--search-budget 5m": "--search-budget 1s --heal-tokens 256",
    "--ratio 0.2 --output": "--ratio 0.2 --heal-tokens 256 --output",
    "--drop 6 --output": "--drop 6 --heal-tokens 256 --output",
    "--ratio 0.25 --engine": "--ratio 0.25 --preset paper --engine",
    "seq_len=512": "seq_len=64",
    "samples=32": "samples=4",
    "32, 512": "4, 64",
    '"piqa,arc_easy"': "generated",
    'preset="paper", ratio=0.25': f'preset="paper", ratio=0.25, calibration="{TEXT}", samples=4, seq_len=32',
    "plan=analysis.plan": f'plan=analysis.plan, calibration="{TEXT}", samples=4, seq_len=32',
}
"""What would take minutes, and what takes seconds; lm-eval's tasks from the Hub stand for generated ones."""

SMALL_RUN = {
    "analyze": "--preset paper --samples 4 --seq-len 32 --calibration wikitext2",
    "prune": "--samples 2 --seq-len 16 --calibration wikitext2",
    "compare": "--calibration wikitext2",
    "eval": "--window 32 --max-windows 2",
    "bench": "--prompt-len 4 --new-tokens 2 --batch 2 --repeats 1",
}
"""Options that a command is given, verb by verb, where the page leaves them open."""


def test_every_command_line_parses() -> None:
    lines = [(f"{block.page}:{block.line}", command) for block in ALL for command in block.commands]
    lines += [(page, command) for page in PAGES for command in inline_commands(page)]
    parsed = 0
    for where, command in lines:
        words = our_words(command)
        if words is not None and not (len(words) == 1 and words[0] in program().commands):  # a verb's mere name
            try:
                parse(words)
            except Exception as error:
                raise AssertionError(f"{where}: {command}: {error}") from error
            parsed += 1
    assert parsed > 60


def test_every_option_in_a_comment_exists() -> None:
    for block in ALL:
        for command, option in block.options_in_comments:
            words = our_words(command)
            assert words is not None, command
            verb: Any = program().commands[words[0]]
            known = {name for parameter in verb.params for name in (*parameter.opts, *parameter.secondary_opts)}
            assert option in known, f"{block.page}:{block.line}: {words[0]} has no {option}"


def test_blocks_that_do_not_run_say_why_and_have_a_language() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        fences, marks = text.count("```"), len(re.findall("<!-- parsed only:", text))
        assert fences == 2 * len(blocks(page)), f"{page}: a fence that is indented or unpaired is not tested"
        assert marks == sum(bool(block.why) for block in blocks(page)), f"{page}: a mark stands above no block"
    assert [f"{block.page}:{block.line}" for block in ALL if not block.language] == []


def test_yaml_and_json_blocks_are_what_they_say(tmp_path: Path) -> None:
    for block in ALL:
        if block.language == "json":
            assert all(json.loads(line) for line in block.text.splitlines())
        elif block.language == "yaml" and "ratio:" in block.text:
            (tmp_path / "recipe.yaml").write_text(block.text, encoding="utf-8")
            load_recipe(str(tmp_path / "recipe.yaml"))
        elif block.language == "yaml":
            yaml.safe_load(block.text)


def test_links_lead_to_files_and_headings() -> None:
    for page in (*PAGES, "CONTRIBUTING.md"):
        folder = (ROOT / page).parent
        for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, heading = target.partition("#")
            file = (folder / name).resolve() if name else ROOT / page
            assert file.exists(), f"{page}: {target}"
            if heading and file.suffix == ".md":
                assert heading in headings(file), f"{page}: {target}"


def headings(file: Path) -> set[str]:
    """The anchors of a page, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Deep enough for the layer indices in the pages; its layers do enough for their removal to be felt."""
    shape = {"num_hidden_layers": 20, "hidden_size": 16, "max_position_embeddings": 4096, "initializer_range": 0.1}
    return save_tiny(tmp_path / "tiny", **shape, bos_token_id=0, eos_token_id=1, pad_token_id=2)


def stand_ins(tiny: Path) -> dict[str, str]:
    """Every name in the pages that a test has no network for, and what stands for it."""
    models = ("HuggingFaceTB/SmolLM2-135M-Instruct", "MODEL", "meta-llama/Llama-3.1-70B")
    data = {"wikitext2": TEXT, "c4": "jsonl:pages.jsonl:text"} | {"alpaca": "chat:conversations.jsonl"}
    return {**SMALLER, **data, **dict.fromkeys(models, str(tiny)), "/mnt/disk": "scratch"}


def prepared(page: str, tiny: Path, folder: Path) -> dict[str, Any]:
    """Writes what a page's reader has already, and returns the names that its Python blocks start with."""
    (folder / "notes.txt").write_text((ROOT / "LICENSE").read_text(encoding="utf-8"), encoding="utf-8")
    talk = {"messages": [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5 " * 40}]}
    (folder / "conversations.jsonl").write_text((json.dumps(talk) + "\n") * 80, encoding="utf-8")
    (folder / "pages.jsonl").write_text(json.dumps({"text": "one page of text " * 400}) + "\n", encoding="utf-8")
    (folder / "pages.jsonl.gz").write_bytes(gzip.compress((folder / "pages.jsonl").read_bytes()))
    (folder / "scratch").mkdir()
    plan = json.dumps({"num_layers": 20, "removed": [13, 14, 15]})
    (folder / "plan.json").write_text(plan, encoding="utf-8")
    if page == "docs/onwards.md":
        write_gguf(folder / "SmolLM2-135M-Instruct.Q4_1.gguf", num_hidden_layers=20)
    for name in EARLIER.get(page, ()):
        assert run_cli("prune", tiny, "--plan", "plan.json", "-o", name, "--no-verify").code == 0
    model, other = (AutoModelForCausalLM.from_pretrained(tiny) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    given = {"model": model, "other": other, "tokenizer": tokenizer}
    return {"__name__": "page", "sglp_llm": sglp_llm, "generated": load_suite("generated"), **given}


EARLIER = {"docs/evaluation.md": ("smollm2-25",)}
"""Folders that a page takes for granted."""


def small(block: Block) -> Block:
    """The block with the options of `SMALL_RUN` that its commands do not have."""
    lines = []
    for line in block.text.replace("\\\n", " ").splitlines():
        command, mark, comment = line.partition(" #")
        if (found := re.match(r"sglp-llm ([a-z-]+) ", command)) and "--suite" not in command:
            added = re.findall(r"--[a-z-]+ \S+", SMALL_RUN.get(found[1], ""))
            command = " ".join([command.rstrip(), *(each for each in added if each.split()[0] not in command)])
        lines.append(command + mark + comment)
    return Block(block.page, block.line, block.language, "\n".join(lines), block.why)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_blocks_run(page: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names, table = prepared(page, tiny, folder), stand_ins(tiny)
    for block in blocks(page):
        if block.why:
            continue
        if block.language in SHELL:
            run_shell(small(block), table, folder)
        elif block.language == "python":
            run_python(block, table, names)


def test_the_criterion_of_the_page_is_a_criterion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block for block in blocks("docs/add-a-criterion.md") if block.language == "python"]
    (tmp_path / "output_norm.py").write_text(block.text, encoding="utf-8")
    monkeypatch.setattr(criteria, "__path__", [*criteria.__path__, str(tmp_path)])
    tiny = save_tiny(tmp_path / "tiny")
    options = ("--criterion", "output_norm", "--calibration", TEXT, "--samples", 2, "--seq-len", 16, "--drop", 1)
    outcome = run_cli("analyze", tiny, *options, "--json")
    assert outcome.code == 0, outcome
    scores = json.loads(outcome.out)["plan"]["scores"]["output_norm"]
    assert len(scores) == 6
    assert min(scores) > 0


def test_the_family_of_the_page_is_the_one_in_the_package() -> None:
    (block,) = [block for block in blocks("docs/add-a-family.md") if block.language == "python"]
    names: dict[str, Any] = {}
    run_python(block, {}, names)
    there = get_adapter("qwen2")
    assert (names["ADAPTER"].display_name, names["ADAPTER"].layers) == (there.display_name, there.layers)
