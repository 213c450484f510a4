"""The code blocks and command lines of README.md and docs/, and how a block runs on a tiny model.

A block that needs what a test has not (the Hub, several processes, hours) is marked in its page by a comment in the line above:
``<!-- parsed only: WHY -->``. The command lines in it are parsed and not run.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import run_cli
from helpers import ROOT

PAGES = ("README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")))
SHELL = ("sh", "bash")

_BLOCK = re.compile(
    r"^(?:<!-- parsed only: (?P<why>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
_INLINE = re.compile(r"`(sglp-llm [^`]+)`")


@dataclass(frozen=True)
class Block:
    """One block of code.

    Attributes:
        page: Its page.
        line: Number of the line in which it begins.
        language: The word behind the fence.
        text: What is in it.
        why: Why it does not run; empty where it does.
    """

    page: str
    line: int
    language: str
    text: str
    why: str

    @property
    def commands(self) -> list[str]:
        """The command lines of a shell block, joined and without comments; of a transcript those behind ``$``."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "text":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        elif self.language not in SHELL:
            return []
        bare = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
        return [line for line in bare if line]

    @property
    def options_in_comments(self) -> list[tuple[str, str]]:
        """Pairs of a command line and an option that the comment behind it names."""
        if self.language not in SHELL:
            return []
        pairs = []
        for line in self.text.replace("\\\n", " ").splitlines():
            command, _, comment = line.partition("#")
            pairs += [(command, option) for option in re.findall(r"(?<!\w)--[a-z-]+", comment) if command.strip()]
        return pairs


def blocks(page: str) -> list[Block]:
    """All blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start()].count("\n") + 1, found["language"], found["text"], found["why"] or "")
        for found in _BLOCK.finditer(text)
    ]


def inline_commands(page: str) -> list[str]:
    """The command lines inside sentences and tables; those that stand for any verb or end in dots are left out."""
    text = _BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    found = [line.replace("\\|", "|").replace("\n", " ") for line in _INLINE.findall(text)]
    return [line for line in found if "COMMAND" not in line and not line.rstrip().endswith("...")]


def our_words(command: str) -> list[str] | None:
    """The words behind ``sglp-llm``, or behind ``-m sglp_llm`` of a launcher; ``None`` for other programs."""
    words = shlex.split(command.partition(">")[0])
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[:1] == ["sglp-llm"]:
        return words[1:]
    return words[words.index("sglp_llm") + 1 :] if "sglp_llm" in words and "-m" in words else None


def check_other_program(command: str) -> None:
    """A line of another program that does not run here: its targets and files must exist."""
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert words[1] in targets, command
    elif words[:2] == ["pip", "install"]:
        assert (ROOT / words[words.index("-c") + 1]).is_file(), command
    else:
        raise AssertionError(f"{command!r} is no program that a test knows: mark the block")


def stood_in(text: str, table: Mapping[str, str]) -> str:
    """The text with every name of the table replaced, longest first."""
    for name in sorted(table, key=len, reverse=True):
        text = re.sub(rf"(?<![\w/.-]){re.escape(name)}(?![\w/])", lambda _, name=name: table[name], text)
    return text


def run_shell(block: Block, table: Mapping[str, str], folder: Path) -> None:
    """Runs a block line by line: our commands in this process, simple ones of the shell in a shell."""
    for command in block.commands:
        line = stood_in(command, table)
        words = our_words(line)
        if words is not None:
            outcome = run_cli(*words)
            assert outcome.code == 0, (f"{block.page}:{block.line}", line, outcome)
        elif line.startswith("echo "):
            subprocess.run(["bash", "-c", line], cwd=folder, check=True)
        else:
            check_other_program(line)


def run_python(block: Block, table: Mapping[str, str], names: dict[str, Any]) -> None:
    """Runs a block in the names that the page has so far."""
    code = compile(stood_in(block.text, table), f"{block.page}:{block.line}", "exec")
    exec(code, names)
