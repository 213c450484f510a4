"""The page of every verb, in Markdown, from the command itself: its help, its options by panel, its example."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperOption

from sglp_llm.cli.main import app
from sglp_llm.cli.panels import ORDER

READ_ON = {
    "prune": "command-line.md",
    "analyze": "command-line.md",
    "replan": "command-line.md#another-choice-from-the-same-scores",
    "heal": "heal.md",
    "eval": "evaluation.md",
    "bench": "evaluation.md#speed-and-memory",
    "compare": "compare.md",
    "report": "command-line.md#output",
    "push": "hub.md",
    "export": "onwards.md",
    "plan-memory": "larger-than-memory.md",
}
"""The page that explains a verb."""


def verb_pages() -> dict[str, str]:
    """Markdown by file name in the folder ``commands``; ``index.md`` lists the verbs."""
    group: Any = typer.main.get_command(app)
    lines = ["# Commands", "", "Made from `sglp-llm COMMAND --help`.", "", "| command | what it does |", "|---|---|"]
    pages = {}
    for name, command in group.commands.items():
        lines.append(f"| [`sglp-llm {name}`]({name}.md) | {_cell(command.help)} |")
        pages[f"{name}.md"] = _page(name, command)
    return {"index.md": "\n".join(lines) + "\n", **pages}


def _page(name: str, command: Any) -> str:
    context = typer.Context(command, info_name=f"sglp-llm {name}")
    parts = [f"# sglp-llm {name}", command.help]
    usage = " ".join(command.collect_usage_pieces(context))
    parts += [f"```text\nsglp-llm {name} {usage}\n```", f"```sh\n{command.epilog}\n```"]
    if name in READ_ON:
        parts.append(f"[Read on](../{READ_ON[name]})")
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        is_option = isinstance(parameter, TyperOption)
        if is_option and parameter.is_flag:
            parameter.show_default = False
        said, what = parameter.get_help_record(context) or ("", "")
        panel = parameter.rich_help_panel or ORDER[-1] if is_option else "Arguments"
        panels.setdefault(panel, []).append(f"| `{_code(said)}` | {_cell(what)} |")
    for panel in sorted(panels, key=ORDER.index):
        parts.append("\n".join([f"## {panel}", "", "| option | what it is |", "|---|---|", *panels[panel]]))
    return "\n\n".join(parts) + "\n"


def _code(text: str) -> str:
    return text.replace("|", "\\|")


def _cell(text: str) -> str:
    return _code(text).replace("<", "&lt;")
