"""``report.html``: one file that shows a checkpoint, an analysis or a comparison without a network.

Drawings are SVG in the file itself and the script is short, so that the file is small enough to pass on. Every text that comes
from a model, a data set or a plan is escaped by the template engine.
"""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from sglp_llm.errors import UserError
from sglp_llm.plan import PLAN_FILE_NAME
from sglp_llm.report.comparison_contents import COMPARISON_FILE_NAME, gather_comparison
from sglp_llm.report.contents import gather
from sglp_llm.report.numbers import shown

REPORT_FILE_NAME = "report.html"


def write_report(folder: Path) -> Path:
    """Writes the report of a folder that holds a plan or a comparison; returns its path.

    Raises:
        UserError: The folder holds neither, or a damaged one.
    """
    if (folder / PLAN_FILE_NAME).is_file():
        contents = gather(folder)
        return _write(folder, "checkpoint.html", contents, f"{contents.name}: layers removed")
    if (folder / COMPARISON_FILE_NAME).is_file():
        comparison = gather_comparison(folder)
        return _write(folder, "comparison.html", comparison, f"{comparison.name}: methods compared")
    raise UserError(
        f"{folder}: no {PLAN_FILE_NAME} and no {COMPARISON_FILE_NAME} here: give a folder that analyze, prune, heal or compare "
        "has written"
    )


def _write(folder: Path, template: str, contents: object, title: str) -> Path:
    file = folder / REPORT_FILE_NAME
    file.write_text(_environment().get_template(template).render(it=contents, title=title), encoding="utf-8")
    return file


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sglp_llm.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_function"] = json.dumps
    environment.globals["shown"] = shown
    return environment
