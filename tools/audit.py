"""Looks at what is shipped: known vulnerabilities of the pinned versions, licences, and what the sdist and the wheel hold.

Usage: audit.py PYTHON, with a Python that has build, pip-audit, pip-licenses and twine. The licences are those of the packages of
PYTHON. Every check is made, whatever the others find; the exit code is 1 where one has failed or could not be made.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
BIN = Path(sys.executable).parent

SERVICES = ("pypi", "osv")
"""Those of pip-audit, in the order in which they are asked: a mirror of PyPI does not answer what PyPI answers."""

CANARY = "requests==2.19.0"
"""A version with known vulnerabilities: a service that finds nothing in it finds nothing anywhere."""

FORBIDDEN = "GNU General Public License;GNU Affero General Public License;AGPL-3;GPL-3.0-only;GPL-3.0-or-later"
PACKAGE = ("sglp_llm", "recipes", "eval")
BESIDE = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md")


class Unanswered(Exception):
    """A service did not say of every version whether a vulnerability is known; the message says why."""


def vulnerabilities(constraints: str) -> str | None:
    """What is wrong with the pinned versions: known vulnerabilities, or that no service answered. They are printed."""
    unanswered = []
    for service in SERVICES:
        try:
            if not known(answer(service, [CANARY])):
                raise Unanswered(f"it knows none in {CANARY}, which has some")
            found = [line for pins in in_rounds(constraints) for line in known(answer(service, pins))]
        except Unanswered as reason:
            unanswered.append(f"{service}: {reason}")
            continue
        for line in found:
            print(line)
        return f"{len(found)}, see above" if found else None
    return f"COULD NOT BE LOOKED UP ({'; '.join(unanswered)})"


def in_rounds(constraints: str) -> list[list[str]]:
    """The pinned versions for all Pythons, so divided that no list names a package twice: pip-audit refuses that."""
    rounds: list[dict[str, str]] = []
    for line in constraints.splitlines():
        pin = line.split("#")[0].split(";")[0].strip()
        if pin:
            name = pin.split("==")[0].lower()
            of_name = next((each for each in rounds if name not in each), None)
            if of_name is None:
                rounds.append(of_name := {})
            of_name[name] = pin
    return [list(each.values()) for each in rounds]


def answer(service: str, pins: Iterable[str]) -> Mapping[str, Any]:
    """What pip-audit found.

    Raises:
        Unanswered: It found nothing out.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, found = Path(folder, "pins.txt"), Path(folder, "found.json")
        asked.write_text("\n".join(pins))
        options = ["--vulnerability-service", service, "--format", "json", "--output", str(found)]
        command = [BIN / "pip-audit", *options, "--progress-spinner=off", "--disable-pip", "--no-deps", "-r", asked]
        ended = subprocess.run(command, capture_output=True, text=True)
        if not found.exists():
            raise Unanswered((ended.stderr.strip().splitlines() or ["it said nothing"])[-1][:120])
        return json.loads(found.read_text())  # type: ignore[no-any-return]


def known(found: Mapping[str, Any]) -> list[str]:
    """The known vulnerabilities, one a line.

    Raises:
        Unanswered: Versions were left out.
    """
    lines = [
        f"{package['name']} {package['version']}: {each['id']}, mended in {', '.join(each['fix_versions']) or 'no version'}"
        for package in found["dependencies"]
        for each in package.get("vulns", ())
    ]
    left_out = [package["name"] for package in found["dependencies"] if "skip_reason" in package]
    if left_out:
        raise Unanswered("; ".join([f"it does not know {', '.join(left_out[:3])}", *lines]))
    return lines


def licences(python: str) -> str | None:
    """Whether a package has a licence that ours does not go with; the list is printed."""
    options = ("--from=mixed", "--order=license", "--partial-match", f"--fail-on={FORBIDDEN}", f"--python={python}")
    return run(BIN / "pip-licenses", *options)


def build() -> str | None:
    """Makes the sdist, and the wheel from it."""
    shutil.rmtree(DIST, ignore_errors=True)
    return run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)


def contents() -> str | None:
    """Whether sdist and wheel hold the files of the package that git knows, and nothing else."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    package = {name for name in listed.splitlines() if name.split("/")[0] in PACKAGE}
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    with tarfile.open(sdist) as archive:
        inside = {file.name.partition("/")[2] for file in archive if file.isfile()}
    made = {name for name in inside if name.startswith("sglp_llm.egg-info/")} | {"PKG-INFO"}
    wrong = {f"sdist: {name}" for name in (inside - made) ^ (package | {*BESIDE})}
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {name if name.startswith("sglp_llm/") else f"sglp_llm/{name}" for name in package}
    wrong |= {f"wheel: {name}" for name in inside ^ wanted}
    return f"too many or missing: {', '.join(sorted(wrong))}" if wrong else None


def twine() -> str | None:
    """Whether an index would take and show what was built."""
    return run(BIN / "twine", "check", "--strict", *DIST.iterdir())


def run(*command: str | Path) -> str | None:
    """Runs a command that prints what it finds; says that it failed."""
    code = subprocess.run(command, cwd=ROOT).returncode
    return f"exit code {code}, see above" if code else None


def main(python: str) -> int:
    """All checks, and a line for each at the end."""
    problems = {
        "known vulnerabilities": vulnerabilities((ROOT / "constraints.txt").read_text()),
        "licences": licences(python),
        "build": build(),
    }
    if problems["build"] is None:
        problems |= {"contents of sdist and wheel": contents(), "twine check": twine()}
    print(*(f"audit: {check}: {problem or 'ok'}" for check, problem in problems.items()), sep="\n")
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
