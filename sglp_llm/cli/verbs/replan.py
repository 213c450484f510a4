"""``sglp-llm replan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sglp_llm.cli import panels
from sglp_llm.cli.options import (
    Context,
    CriterionName,
    Drop,
    Features,
    Json,
    MinDrop,
    NumSegments,
    ProtectFirst,
    ProtectLast,
    Quiet,
    Ratio,
    Segments,
    SegmentsRule,
    TargetLatency,
    TargetMemory,
    TargetParams,
    settings_of,
)
from sglp_llm.cli.quiet import prepare
from sglp_llm.errors import UserError


def replan(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="sglp_plan.json, or the folder it is in.")],
    ratio: Ratio = None,
    drop: Drop = None,
    target_params: TargetParams = None,
    target_memory: TargetMemory = None,
    target_latency: TargetLatency = None,
    context: Context = None,
    criterion: CriterionName = None,
    segments: Segments = None,
    num_segments: NumSegments = None,
    segments_rule: SegmentsRule = None,
    features: Features = None,
    min_drop: MinDrop = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    compensate: Annotated[
        str | None,
        typer.Option(
            metavar="none",
            help="none: leave out the compensation, which is fitted to the removed layers.",
            rich_help_panel=panels.REPAIR,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="JSON file to write.", rich_help_panel=panels.OUTPUT),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace the output file if it exists.", rich_help_panel=panels.OUTPUT)
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Choose layers again from the scores in a plan, without the model. Writes nothing without --output."""
    settings = {name: value for name, value in settings_of(locals()).items() if value is not None}
    console = prepare(quiet)
    from sglp_llm.analysis.replanning import replan
    from sglp_llm.checkpoint.publish_file import atomic_file, check_file
    from sglp_llm.plan import PLAN_FILE_NAME, save_plan

    if output is not None:
        read = plan / PLAN_FILE_NAME if plan.is_dir() else plan
        if output.exists() and read.exists() and output.samefile(read):
            raise UserError(
                f"{output}: is the plan that is read, and belongs to what lies beside it; choose another file"
            )
        check_file(output, overwrite)
    found = replan(plan, **settings)
    if output is not None:
        with atomic_file(output, overwrite) as partial:
            save_plan(found, partial)
    if as_json:
        console.print_json(console.plan_to_dict(found))
        return
    console.print_plan(found)
    if output is not None:
        print(f"Written           {output}")
