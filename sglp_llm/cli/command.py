"""How a verb shows its help, and how its errors name the option to change."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from sglp_llm.cli.panels import ORDER
from sglp_llm.errors import UserError

_WIDEST = 100
_NARROWEST = 30


class Command(TyperCommand):
    """A verb: its help has one section a panel, as plain text, and ends with an example that can be copied.

    The epilog is the example. Plain text is written faster than rich's boxes, and can be read in any width.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.width = _width()
        super().format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, TyperOption) and parameter.is_flag:
                parameter.show_default = False  # it would say "no-overwrite"
            if (record := parameter.get_help_record(ctx)) is not None:
                is_argument = parameter.param_type_name == "argument"
                panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or ORDER[-1]
                panels.setdefault(panel, []).append(record)
        for panel in sorted(panels, key=lambda name: ORDER.index(name) if name in ORDER else 0):
            _write(formatter, panel, panels[panel])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            formatter.write_paragraph()
            formatter.write_heading(_shown("Example", bold=True))
            formatter.write(f"  {self.epilog}\n")

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            names = options_named(str(error), ctx.command.params, ctx.params)
            if not names:
                raise
            raise type(error)(f"{error} ({', '.join(names)})") from error


class Group(TyperGroup):
    """The program: its help lists the verbs in panels."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.width = _width()
        super().format_help(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            panels.setdefault(command.rich_help_panel, []).append((name, command.help.partition("\n")[0]))
        for panel, rows in panels.items():
            _write(formatter, panel, rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        formatter.write_paragraph()
        formatter.write_heading(_shown("Example", bold=True))
        formatter.write(f"  {self.epilog}\n")


def options_named(message: str, parameters: list[Any], given: dict[str, Any]) -> list[str]:
    """The options that a message is about, where it does not say so: it may come from code that knows settings only.

    An option is meant when the message has the name of its setting, and this was given or has several words; or has the value
    that was given for it.

    Args:
        message: The message.
        parameters: The verb's parameters.
        given: Their values by name.
    """
    if "--" in message:
        return []
    found = []
    for parameter in parameters:
        if parameter.param_type_name != "option":
            continue
        value = given.get(parameter.name)
        is_given = value is not None and value is not False and value != parameter.default
        named = re.search(rf"\b{re.escape(parameter.name)}\b", message) is not None
        # Of a path, Typer before 0.29 has the text here; a file's name may be any word of the message.
        is_path = getattr(getattr(parameter, "type", None), "name", "") == "path"
        texts = [] if is_path else [value] if isinstance(value, str) else value if isinstance(value, list) else []
        quoted = is_given and any(
            len(text) > 2 and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", message) for text in texts
        )
        if quoted or (named and (is_given or "_" in parameter.name)):
            found.append(max(parameter.opts, key=len))
    return found


def _write(formatter: Any, heading: str, rows: list[tuple[str, str]]) -> None:
    """A section: names on the left, and what they mean on the right, or below names that take a third of the width."""
    formatter.write_paragraph()
    formatter.write_heading(_shown(heading, bold=True))
    most = formatter.width // 3
    left = min(max(len(name) for name, _ in rows), most) + 4
    for name, text in rows:
        lines = textwrap.wrap(text, max(formatter.width - left, 20), break_on_hyphens=False) or [""]
        if len(name) > most:
            lines.insert(0, "")
        gap = " " * max(left - 2 - len(name), 0) if lines[0] else ""
        formatter.write(f"  {_shown(name, fg='cyan')}{gap}{lines[0]}\n")
        for line in lines[1:]:
            formatter.write(f"{' ' * left}{line}\n")


def _shown(text: str, **style: Any) -> str:
    """Styled text; the styles are dropped where stdout is no terminal."""
    return text if os.environ.get("NO_COLOR") else typer.style(text, **style)


def _width() -> int:
    return max(min(shutil.get_terminal_size().columns, _WIDEST), _NARROWEST) - 1
