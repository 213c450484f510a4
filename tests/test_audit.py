"""What `make audit` says of known vulnerabilities: never "ok" where a service did not answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import audit

PINS = "absl-py==2.5.1\nnumpy==2.4.6; python_version >= '3.11'\nnumpy==2.2.6; python_version < '3.11'\n"

# It reads beside it what each service says: a message, or packages that it does not know and versions with a vulnerability.
PIP_AUDIT = """
import json, pathlib, sys

said = json.loads(pathlib.Path(__file__).with_name("said.json").read_text())[sys.argv[2]]
if isinstance(said, str):
    sys.exit("Traceback\\n" + said)
found = {}
for pin in pathlib.Path(sys.argv[-1]).read_text().split():
    name, version = pin.split("==")
    assert name not in found
    known = [{"id": "PYSEC-2018-28", "fix_versions": ["2.20.0"]}] if pin in said else []
    found[name] = {"skip_reason": "unknown"} if name in said else {"version": version, "vulns": known}
answer = {"dependencies": [{"name": name, **each} for name, each in found.items()]}
pathlib.Path(sys.argv[sys.argv.index("--output") + 1]).write_text(json.dumps(answer))
"""


def pip_audit(folder: Path, monkeypatch: pytest.MonkeyPatch, **said: list[str] | str) -> None:
    """A pip-audit whose services are not on a network."""
    (folder / "said.json").write_text(json.dumps(said))
    (folder / "pip-audit").write_text(f"#!{sys.executable}{PIP_AUDIT}")
    (folder / "pip-audit").chmod(0o755)
    monkeypatch.setattr(audit, "BIN", folder)


@pytest.mark.parametrize(
    ("pypi", "osv", "said"),
    [
        ([audit.CANARY], "", None),
        (["requests"], [audit.CANARY], None),
        ([audit.CANARY, "numpy==2.2.6"], "", "1, see above"),
        ([audit.CANARY, "absl-py"], [audit.CANARY, "absl-py==2.5.1"], "1, see above"),
        (["requests"], "no route", "COULD NOT BE LOOKED UP (pypi: it does not know requests; osv: no route)"),
        (
            [],
            [],
            "COULD NOT BE LOOKED UP (pypi: it knows none in requests==2.19.0, which has some; osv: it knows none in",
        ),
        (
            [audit.CANARY, "absl-py", "numpy==2.4.6"],
            "no route",
            "COULD NOT BE LOOKED UP (pypi: it does not know absl-py; numpy 2.4.6: PYSEC-2018-28, mended in 2.20.0; osv: no",
        ),
    ],
)
def test_verdict(
    pypi: list[str], osv: list[str] | str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_audit(tmp_path, monkeypatch, pypi=pypi, osv=osv)
    found = audit.vulnerabilities(PINS)
    assert (found is None) if said is None else (found is not None and found.startswith(said)), found


def test_every_pinned_version_is_looked_up() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    rounds = [[Requirement(pin) for pin in pins] for pins in audit.in_rounds("\n".join(lines))]
    assert {(each.name, str(each.specifier)) for each in pinned} == {
        (each.name, str(each.specifier)) for pins in rounds for each in pins
    }
    for pins in rounds:
        assert len({canonicalize_name(pin.name) for pin in pins}) == len(pins)


def test_the_answer_of_a_real_pip_audit() -> None:
    found = json.loads(
        '{"dependencies": [{"name": "requests", "version": "2.19.0", "vulns": [{"id": "PYSEC-2018-28", "fix_versions": '
        '["2.20.0"], "aliases": ["CVE-2018-18074"], "description": "..."}]}, {"name": "idna", "version": "3.20", "vulns": []}]}'
    )
    assert audit.known(found) == ["requests 2.19.0: PYSEC-2018-28, mended in 2.20.0"]
