"""What a person sees at the door: help, examples, completion, colours, widths, and which option an error is about."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import run_cli, save_tiny
from command_lines import parse, program
from helpers import ROOT

from sglp_llm.cli import panels
from sglp_llm.cli.command import options_named
from sglp_llm.cli.quiet import prepare
from sglp_llm.criteria import criterion_names

VERBS = sorted(program().commands)
COMMAND = [sys.executable, "-m", "sglp_llm"]


def sections(text: str) -> dict[str, list[str]]:
    """The lines of each section of a help, by heading."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith(" ") and line.endswith(":"):
            found[line[:-1]] = []
        elif found:
            next(reversed(found.values())).append(line)
    return found


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_help_fits_the_window_and_every_panel_one_screen(
    verb: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    outcome = run_cli(verb, "--help")
    found = sections(outcome.out)
    assert set(found) - {"Example"} <= set(panels.ORDER)
    shown = [line for name, lines in found.items() if name != "Example" for line in lines]
    too_long = [line for line in shown if len(line) >= columns and not line.startswith("  -")]  # names are not broken
    assert too_long == []
    if columns >= 80:
        assert max(len(lines) for lines in found.values()) <= 24


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_is_and_the_example_parses(verb: str) -> None:
    command: Any = program().commands[verb]
    assert all(parameter.help for parameter in command.params)
    name, *words = shlex.split(command.epilog)
    assert (name, words[0], parse(words)) == ("sglp-llm", verb, verb)


def test_a_line_that_is_wrong_does_not_parse() -> None:
    with pytest.raises(Exception, match="No such option: --rati"):
        parse(["prune", "MODEL", "--rati", "0.2"])
    with pytest.raises(Exception, match="No such command 'prnue'"):
        parse(["prnue", "MODEL"])


def test_alone_it_prints_the_help() -> None:
    alone, asked = run_cli(), run_cli("--help")
    assert (alone.code, alone.out.strip(), alone.err) == (0, asked.out.strip(), "")
    assert set(VERBS) <= set(re.findall(r"^  ([a-z-]+)  ", alone.out, re.MULTILINE))


def in_a_terminal(*arguments: str, **environment: str) -> str:
    """What the program prints where stdout is a terminal."""
    reader, writer = pty.openpty()
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment}
    subprocess.run([*COMMAND, *arguments], env=variables, stdout=writer, stderr=subprocess.DEVNULL, check=True)
    os.close(writer)
    with io.FileIO(reader) as file:
        parts = []
        while True:
            try:
                parts.append(file.read(65536))
            except OSError:  # the other end is closed
                break
            if not parts[-1]:
                break
    return b"".join(part for part in parts if part).decode()


def test_colours_are_for_terminals_and_can_be_switched_off() -> None:
    assert "\x1b[" in in_a_terminal("ls", "--help")
    assert "\x1b[" not in in_a_terminal("ls", "--help", NO_COLOR="1")
    assert "\x1b[" not in run_cli("ls", "--help").out


def completed(line: str) -> set[str]:
    """The words that bash would offer."""
    words = line.split(" ")
    variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_SGLP_LLM_COMPLETE": "complete_bash"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    # The program's name is that of the script, as where it is installed.
    code = (
        "import sys; from sglp_llm.cli.main import _run; code = _run(); "
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in ended.stderr, ended.stderr
    return {word.partition(",")[2] or word for word in ended.stdout.split()}


def test_the_shell_completes_verbs_options_and_names() -> None:
    assert completed("sglp-llm pr") == {"prune"}
    assert completed("sglp-llm prune --target-m") == {"--target-memory"}
    assert completed("sglp-llm prune --preset f") == {"fast"}
    assert completed("sglp-llm prune --criterion ") == {"sglp", *criterion_names()}
    assert completed("sglp-llm ls su") == {"suites"}


@pytest.mark.parametrize("columns", [40, 120])
def test_a_table_that_does_not_fit_a_narrow_window_is_a_list(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads(run_cli("ls", "presets", "--json").out)["presets"]
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = run_cli("ls", "presets").out.splitlines()
    assert max(map(len, shown)) <= columns
    if columns == 40:
        assert [line for line in shown[1:] if not line.startswith(" ")] == [row["name"] for row in rows]
        assert "  compensate: auto" in shown
    else:
        assert shown[1].split()[:3] == ["name", "criterion", "compensate"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        ("prune {tiny} -o out --drop 1 --calibration pydoc --samples 0", "(--samples)"),
        ("prune {tiny} -o out --drop 1 --calibration pydoc --seq-len 1", "(--seq-len)"),
        ("prune {tiny} -o out --drop 1 --criterion gradnrm", "(--criterion)"),
        ("eval {tiny} --data nope", "(--data)"),
        ("eval {tiny} --data pydoc --window 1", "(--window)"),
    ],
)
def test_an_error_names_the_option_to_change(
    arguments: str, end: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run_cli(*arguments.replace("{tiny}", str(tiny)).split())
    assert outcome.code == 2
    assert outcome.error.endswith(end), outcome.error


def test_options_that_are_not_meant_are_not_named() -> None:
    prune: Any = program().commands["prune"]
    given = {parameter.name: parameter.default for parameter in prune.params} | {"ratio": 0.5, "seed": 3}
    assert options_named("the ratio is too large", prune.params, given) == ["--ratio"]
    assert options_named("lower samples or seq_len", prune.params, given) == ["--seq-len"]  # --samples was not given
    assert options_named("the weights are damaged", prune.params, given) == []
    assert options_named("a ratio: give --drop instead", prune.params, given) == []


def test_quiet_leaves_the_result_and_nothing_else(tiny: Path) -> None:
    options = ("eval", tiny, "--data", "pydoc", "--window", 32, "--max-windows", 2)
    loud, quiet = run_cli(*options), run_cli(*options, "--quiet")
    assert (quiet.out, quiet.err) == (loud.out, "")
    assert loud.err.startswith("Scoring")
    assert "━" not in loud.err  # no bars where stderr is no terminal


@pytest.mark.parametrize("columns", [30, 60, 120])
def test_progress_stays_in_one_line_of_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    console = prepare()
    with console.progress_bar("Analysing", 3) as advance:
        advance(3)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert ("━" in plain) == (columns >= 70)
    assert all(len(line.rstrip()) <= columns for line in plain.replace("\r", "\n").splitlines())
