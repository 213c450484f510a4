"""What the wheel and the source distribution hold: the package, its data and its licence, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from helpers import ROOT

FOLDERS = ("sglp_llm", "recipes", "eval")
AT_THE_TOP = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"


def build(kind: str, project: Path, output: Path) -> Path:
    """A wheel or sdist of a project, by the backend that pip would call."""
    command = [sys.executable, "-c", BUILD, kind, str(output)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository; building leaves files beside the sources."""
    made = (".*", "__pycache__", "*.egg-info", "build", "dist", "site", "*-output")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "project", ignore=shutil.ignore_patterns(*made))


@pytest.fixture(scope="module")
def sdist(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", project, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    return top


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from the sdist, so that the sdist is known to be enough."""
    return zipfile.ZipFile(build("wheel", unpacked, tmp_path_factory.mktemp("wheel")))


def expected_files() -> set[str]:
    """Every file of the folders of the package, by its path in the repository."""
    return {
        str(file.relative_to(ROOT))
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_the_sdist_holds_what_a_wheel_is_made_of(unpacked: Path) -> None:
    found = {str(file.relative_to(unpacked)) for file in unpacked.rglob("*") if file.is_file()}
    found = {name for name in found if not name.startswith("sglp_llm.egg-info/")}
    assert found == {*expected_files(), *AT_THE_TOP, "PKG-INFO"}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    inside = {name if name.startswith("sglp_llm/") else f"sglp_llm/{name}" for name in expected_files()}
    names = wheel.namelist()
    assert len(names) == len(set(names))
    (info,) = {name.split("/")[0] for name in names} - {"sglp_llm"}
    about = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    assert set(names) == {*inside, *(f"{info}/{name}" for name in about)}
    for name in inside:
        original = name if name.startswith("sglp_llm/") and (ROOT / name).exists() else name.removeprefix("sglp_llm/")
        assert wheel.read(name) == (ROOT / original).read_bytes(), name


def test_the_metadata_of_the_wheel(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = HeaderParser().parsestr(wheel.read(name).decode())
    assert metadata["License"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    (entry,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "sglp-llm = sglp_llm.cli.main:main" in wheel.read(entry).decode()
