"""Every command that writes, with what tells that its result is whole, and how it is begun again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from checkpoints import SMALL
from forked import contents
from helpers import TEXT

_QUICK = " ".join(SMALL)
_HEALING = f"--data {TEXT} --tokens 128 --seq-len 16 --sequences 2 --learning-rate 0.001 --dtype float32"


@dataclass(frozen=True)
class Run:
    """A command that writes ``out`` in the current folder.

    Attributes:
        name: For the test.
        command: Words in braces stand for what is read, see the fixture ``places``.
        judged: Patterns of the files by which results are compared; all other files need only be there.
        replaces: Whether there is an old output.
        works_in: What may be left by a run that is killed, beside the output, to go on from.
        resumes: Options that go on from there, where it exists.
    """

    name: str
    command: str
    judged: tuple[str, ...] = ("*.safetensors", "config.json", "tokenizer*")
    replaces: bool = False
    works_in: str = ""
    resumes: str = ""

    def __str__(self) -> str:
        return self.name

    def arguments(self, places: Mapping[str, Path], folder: Path) -> list[str]:
        """The words of the command; with what is needed to begin it again where an earlier run has left something."""
        words = self.command.format(**places).split()
        if (folder / "out").exists() and self.works_in != "out":
            words.append("--overwrite")
        if self.resumes and (folder / self.works_in).exists():
            words += self.resumes.split()
        return words

    def prepare(self, places: Mapping[str, Path], folder: Path) -> Path:
        """Makes the current folder, with the old output."""
        folder.mkdir(parents=True)
        if self.replaces:
            shutil.copytree(places["old"], folder / "out")
        return folder

    def result(self, folder: Path) -> tuple[frozenset[str], dict[str, str]] | None:
        """The names of all files of the result, and digests of those that are compared; ``None`` where there is none."""
        out = folder / "out"
        if out.is_file():
            return frozenset(), {"out": out.read_text()}
        if not out.exists():
            return None
        names = contents(out)
        return frozenset(name for name in names if "journal" not in name), contents(out, *self.judged)


RUNS = (
    Run("prune", "prune {source} -o out --plan {plan} --no-verify"),
    Run("prune over an old output", "prune {source} -o out --plan {plan} --no-verify", replaces=True),
    Run("learned", f"prune {{source}} -o out --drop 2 --criterion bi --compensate learned --no-verify {_QUICK}"),
    Run(
        "search with a journal",
        f"prune {{source}} -o out --drop 2 --criterion search --journal kept --no-verify {_QUICK}",
        works_in="kept",
    ),
    Run("analyze", f"analyze {{source}} -o out --drop 2 --criterion bi {_QUICK}", judged=("sglp_recipe.yaml",)),
    Run("heal", f"heal {{pruned}} -o out --no-verify {_HEALING}", works_in="out.healing", resumes="--resume"),
    Run(
        "compare",
        f"compare {{source}} -o out --criteria bi,magnitude --drops 1,2 --eval {TEXT} --window 32 --max-windows 4 {_QUICK}",
        judged=("compare.csv", "pairs.csv"),
        works_in="out",
    ),
    Run("export", "export {pruned} --to mergekit -o out"),
)
"""Those that every change is tested with, but for the slow ones."""

LONG_RUNS = (
    Run(
        "prune and heal",
        f"prune {{source}} -o out --drop 2 --criterion bi --heal --heal-tokens 4096 --no-verify {_QUICK}",
        works_in="out.healing",
    ),
    Run("prune with the reload check", "prune {source} -o out --plan {plan}", replaces=True),
)
"""What takes longer, and is made of the others."""

_SLOW = {"learned", "heal", "compare", *map(str, LONG_RUNS)}


def marked(runs: Sequence[Run]) -> list[Run | ParameterSet]:
    """The runs as parameters of a test; the slow ones are marked."""
    return [pytest.param(run, marks=pytest.mark.slow) if run.name in _SLOW else run for run in runs]
