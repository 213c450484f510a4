"""``sglp-llm export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sglp_llm.cli import panels
from sglp_llm.cli.options import Json, Quiet
from sglp_llm.cli.quiet import prepare


def export(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A folder that prune or heal has written; for ollama a .gguf file too."),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORM",
            help="gguf: through llama.cpp's converter; ollama: a Modelfile beside it; vllm-draft: vLLM's configuration with DIR "
            "as draft model of its original; mergekit: the YAML with which mergekit removes the same layers.",
            rich_help_panel=panels.OUTPUT,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="PATH", help="Where to. Default: a file in DIR.", rich_help_panel=panels.OUTPUT
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace the output if it exists.", rich_help_panel=panels.OUTPUT)
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a shortened checkpoint in the form that another program takes."""
    console = prepare(quiet)
    from sglp_llm.onwards.targets import export

    exported = export(folder, to, output, overwrite)
    if as_json:
        console.print_json(exported.to_dict())
        return
    for file in exported.files:
        print(f"Written           {file}")
    for note in exported.notes:
        print(f"Note              {note}")
    if exported.next_command:
        print(f"Next              {exported.next_command}")
