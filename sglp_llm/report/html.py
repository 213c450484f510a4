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
from sglp_llm.report.contents import gather

REPORT_FILE_NAME = "report.html"


def write_report(folder: Path) -> Path:
    """Writes the report of a folder that holds a plan; returns its path.

    Raises:
        UserError: The folder holds no plan, or a damaged one.
    """
    if not (folder / PLAN_FILE_NAME).is_file():
        raise UserError(f"{folder}: no {PLAN_FILE_NAME} here: give a folder that analyze, prune or heal has written")
    contents = gather(folder)
    page = _environment().get_template("checkpoint.html").render(it=contents, title=f"{contents.name}: layers removed")
    file = folder / REPORT_FILE_NAME
    file.write_text(page, encoding="utf-8")
    return file


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sglp_llm.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_function"] = json.dumps
    return environment
