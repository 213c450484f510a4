"""How the repository is laid out: what the wheel holds, and how many files a room has."""

from __future__ import annotations

from configparser import ConfigParser

from helpers import ROOT
from packaging.requirements import Requirement
from setuptools import find_packages

PACKAGE = ROOT / "sglp_llm"
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def setup_cfg() -> ConfigParser:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def test_the_wheel_holds_every_package_and_the_folders_at_the_top() -> None:
    options = setup_cfg()["options"]
    moved = dict(line.split(" = ") for line in options["package_dir"].split("\n") if line)
    assert moved == {"sglp_llm.recipes": "recipes", "sglp_llm.eval": "eval"}
    named = options["packages"].split()
    assert sorted(named) == sorted([*find_packages(str(ROOT), include=["sglp_llm*"]), *moved])


def test_every_file_of_recipes_and_suites_is_in_the_wheel() -> None:
    patterns = setup_cfg()["options.package_data"]
    for package, folder in (("sglp_llm.recipes", ROOT / "recipes"), ("sglp_llm.eval", ROOT / "eval")):
        taken = {file for pattern in patterns[package].split(", ") for file in folder.glob(pattern)}
        assert taken == {file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts}


def test_every_room_has_one_line_in_the_contract() -> None:
    lines = setup_cfg()["importlinter:contract:layers"]["layers"].split("\n")[1:]
    named = [name.strip().removeprefix("sglp_llm.") for line in lines for name in line.split("|")]
    assert len(lines) <= 16
    assert {room.name for room in ROOMS} <= set(named)
    assert len(set(named)) == len(named)


def test_rooms_are_small_and_say_what_they_return() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 9
    for room in ROOMS:
        most = 24 if room.name == "criteria" else 18  # a criterion is a file, and a paper may bring another
        assert len(list(room.glob("*.py"))) <= most, room.name
        assert (room / "__init__.py").read_text(encoding="utf-8").startswith('"""Returns ') or room.name == "cli"


def test_tests_mirror_the_rooms() -> None:
    rooms = {room.name for room in ROOMS}
    for file in (ROOT / "tests").rglob("test_*.py"):
        assert file.parent.name in {*rooms, "tests", "hostile", "faults", "rehearsal"}
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file


def test_the_lowest_versions_are_those_of_the_requirements() -> None:
    config = setup_cfg()
    required = [
        config["options"]["install_requires"],
        *(config["options.extras_require"][each] for each in ("heal", "report")),
    ]
    requirements = [Requirement(line) for lines in required for line in lines.split("\n") if line]
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = {pin.name: str(pin.specifier) for pin in map(Requirement, lines[1:])}
    assert lowest.keys() == {each.name for each in requirements}
    for each in requirements:
        (bound,) = (bound.version for bound in each.specifier if bound.operator == ">=")
        assert each.name == "torch" or lowest[each.name] == f"=={bound}"
