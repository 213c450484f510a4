"""Terminal output: progress bars on stderr; tables and summaries, or JSON, on stdout."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

from sglp_llm.analysis.observing import CKA_COLUMN_SUM
from sglp_llm.analysis.targets import context_of
from sglp_llm.cli.heat_map import heat_map
from sglp_llm.cli.quiet import is_quiet
from sglp_llm.evaluation.records import EvalResult, TaskScore
from sglp_llm.evaluation.side_by_side import Row
from sglp_llm.plan import plan_to_dict
from sglp_llm.progress import Advance
from sglp_llm.records import Analysis, HealReport, PrunePlan, RunReport
from sglp_llm.report.contents import limits_of
from sglp_llm.sizes import show_bytes, show_count

_WIDTH_OF_A_TABLE = 80

_WIDTH_OF_A_BAR = 70
"""Below this many columns the numbers take the whole line."""


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Advance]:
    """A `sglp_llm.progress.Progress` that shows a bar and the remaining time on stderr.

    Where stderr is no terminal it is one line at the end, without a bar; when the verb is quiet, nothing.
    """
    console = Console(stderr=True, quiet=is_quiet())
    counted = (MofNCompleteColumn(),) if total < 1_000_000 else ()
    columns: tuple[ProgressColumn, ...] = (TextColumn("{task.description}"), TaskProgressColumn(), *counted)
    if console.is_terminal and console.width >= _WIDTH_OF_A_BAR:
        columns = (columns[0], BarColumn(), *columns[1:])
    columns = (*columns, TimeElapsedColumn())
    if console.is_terminal:
        columns = (*columns, TextColumn("ETA"), TimeRemainingColumn())
    with RichProgress(*columns, console=console) as bar:
        task = bar.add_task(f"{description:<10}", total=total)
        try:
            yield lambda units: bar.advance(task, units)
        except BaseException:
            console.quiet = console.quiet or not console.is_terminal  # a log keeps only the error message
            raise


def print_json(data: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(data, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> None:
    """A table on stdout; the columns with the given indices are aligned right.

    In a window of fewer than 80 columns a table that does not fit is a list, with the columns of a row below each other.
    """
    print(title)  # not rich's title, which would wrap a long path to the table's width
    width = Console().width
    widest = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    if width < _WIDTH_OF_A_TABLE and sum(widest) + 2 * (len(widest) - 1) > width:
        _print_list(columns, rows, width)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _print_list(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> None:
    for first, *others in rows:
        print(first)
        for column, cell in zip(columns[1:], others, strict=True):
            if cell:
                said = f"{column}: {cell}" if column else cell
                print(textwrap.fill(said, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False))


def analysis_to_dict(analysis: Analysis) -> dict[str, Any]:
    """The analysis as plain data, for ``--json``."""
    return {
        "plan": plan_to_dict(analysis.plan),
        "calibration_loss": analysis.calibration_loss,
        "params_before": analysis.params_before,
        "params_after": analysis.params_after,
    }


def print_analysis(analysis: Analysis, draw: bool | None = False) -> None:
    """The layer table, the CKA matrix if wanted, then what would be removed.

    Args:
        analysis: The analysis.
        draw: Whether to draw the matrix; ``None`` where stdout is a terminal and there is one.
    """
    print_plan(analysis.plan, analysis.calibration_loss, draw)


def _draw_similarity(plan: PrunePlan, is_wanted: bool) -> None:
    console = Console()
    if plan.similarity is None:
        if is_wanted:
            print("\nNo CKA matrix: this method computes none; --preset paper and --segments do")
        return
    print()
    colours = console.is_terminal and not console.no_color and console.color_system is not None
    for line in heat_map(plan.similarity, plan.segments, plan.removed, console.width, colours):
        console.print(line, highlight=False, soft_wrap=True)


def print_plan(plan: PrunePlan, calibration_loss: float | None = None, draw: bool | None = False) -> None:
    """The layer table, then what would be removed; ``draw`` as for `print_analysis`."""
    _print_layers(plan)
    if draw or (draw is None and sys.stdout.isatty()):
        _draw_similarity(plan, bool(draw))
    print()
    if calibration_loss is not None:
        print(f"Calibration loss  {calibration_loss:.4f} nats a token")
    if len(plan.segments) > 1:
        print(f"Segments          {'  '.join(f'{segment.start}..{segment.stop - 1}' for segment in plan.segments)}")
    print(f"Removed           {_removed(plan)}")
    _print_special(plan)
    _print_compensation(plan)
    if (footprint := plan.footprint) is not None:
        before, after = (show_count(footprint.params_without(removed)) for removed in ((), plan.removed))
        print(f"Parameters        {before} -> {after}")
        if "target_memory" in plan.budget:
            context = context_of(plan.settings.get("context"), footprint)
            before, after = (show_bytes(footprint.bytes_without(removed, context)) for removed in ((), plan.removed))
            print(f"Memory            {before} -> {after}, weights and a KV cache of {context:,} tokens")
    _print_decode_times(plan)


def _print_decode_times(plan: PrunePlan) -> None:
    times = plan.settings.get("decode_times")
    if "target_latency" in plan.budget and isinstance(times, Mapping) and {"depths", "seconds", "device"} <= set(times):
        shown = (
            f"{each * 1e3:.3g} ms ({depth} layers)"
            for depth, each in zip(times["depths"], times["seconds"], strict=False)
        )
        print(f"Decode time       {', '.join(shown)}; {plan.budget['target_latency']} was wanted, on {times['device']}")


def report_to_dict(report: RunReport) -> dict[str, Any]:
    """The run as plain data, for ``--json``."""
    return {
        "output": report.output,
        "plan": plan_to_dict(report.plan),
        "bytes_written": report.bytes_written,
        "verification": report.verification,
        "seconds": dict(report.seconds),
        "notes": list(report.notes),
        "analysis": None if report.analysis is None else analysis_to_dict(report.analysis),
        **({} if report.healing is None else {"healing": healing_to_dict(report.healing)}),
    }


def print_report(report: RunReport) -> None:
    """What was removed, what the reload check found, and where the result is."""
    if report.analysis is not None:
        print_analysis(report.analysis)
    else:
        print(f"Removed           {_removed(report.plan)}")
        _print_special(report.plan)
        _print_compensation(report.plan)
    if report.healing is not None:
        _print_times(report.seconds)
        print()
        print_healing(report.healing)
        return
    _print_check(report.verification)
    for note in report.notes:
        print(f"Note              {note}")
    _print_end(report.seconds, report.output, report.bytes_written)


def _print_check(found: Mapping[str, Any] | None) -> None:
    if found is None:
        print("Reload check      switched off")
    else:
        same = (
            "equal"
            if found["max_difference"] == 0
            else f"within {found['max_difference']:.3g} (allowed {found['tolerance']:.3g})"
        )
        cache = "; generation with and without KV cache agrees" if found["generation"] else ""
        print(f"Reload check      {found['tokens']} logit vectors {same} in {found['dtype']}{cache}")


def _print_end(seconds: Mapping[str, float], output: str, written: int) -> None:
    _print_times(seconds)
    print(f"Written           {output} ({show_bytes(written)} of weights)")


def _print_times(seconds: Mapping[str, float]) -> None:
    print(f"Time              {', '.join(f'{stage} {each:.1f} s' for stage, each in seconds.items())}")


def print_perplexity(result: EvalResult, model: str) -> None:
    """Perplexity with everything that is needed to compare it."""
    print(f"Model       {model}")
    print(f"Data set    {result.dataset}")
    print(
        f"Windows     {result.windows} x {result.window} tokens, {'with' if result.bos else 'without'} BOS, not overlapping"
    )
    print(f"Tokens      {result.tokens} predicted")
    print(f"Perplexity  {result.perplexity:.3f} ± {result.perplexity_standard_error:.3f} (standard error)")


def scores_to_dict(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table of scores as plain data, for ``--json``."""
    return [
        {
            **asdict(row.score),
            "baseline": None if row.baseline is None else {"value": row.baseline.value, "stderr": row.baseline.stderr},
            "ratio": row.ratio,
        }
        for row in rows
    ]


def print_scores(rows: Sequence[Row], model: str, baseline: str | None = None) -> None:
    """Scores, with their standard errors, beside the baseline's where there is one."""
    columns = ["task", "metric", "baseline", "±", "model", "±", "model/baseline"]
    table = []
    for row in rows:
        others = ["", ""] if row.baseline is None else _number_and_error(row.baseline)
        ratio = "" if row.ratio is None else f"{row.ratio:.1%}"
        table.append([row.score.task, row.score.metric, *others, *_number_and_error(row.score), ratio])
    if baseline is None:
        columns, table = [*columns[:2], *columns[4:6]], [[*line[:2], *line[4:6]] for line in table]
    print(f"Model     {model}")
    if baseline is not None:
        print(f"Baseline  {baseline}")
    print_table("", columns, table, range(2, len(columns)))


def _number_and_error(score: TaskScore) -> list[str]:
    return [f"{score.value:.4f}", "" if score.stderr is None else f"{score.stderr:.4f}"]


def healing_to_dict(report: HealReport) -> dict[str, Any]:
    """The run as plain data, for ``--json``."""
    return {
        "output": report.output,
        "record": report.record.to_dict(),
        "bytes_written": report.bytes_written,
        "verification": report.verification,
        "seconds": dict(report.seconds),
    }


def print_healing(report: HealReport) -> None:
    """What was trained, what it brought on held-out text, and where the result is."""
    record = report.record
    print(f"Student           {record.student.name}")
    print(f"Teacher           {'none' if record.teacher is None else record.teacher.name}")
    print(f"Trained           {show_count(record.parameters)} parameters ({record.settings['train']})")
    print(f"Text              {record.data}, {record.sequences} sequences, and {record.held_out} held out")
    print(
        f"Steps             {record.steps}; kept are the weights of step {record.best_step} ({record.tokens:,} tokens)"
    )
    for name, label in (("divergence", "Divergence"), ("next_token_loss", "Next-token loss")):
        if name in record.before:
            print(f"{label:<18}{record.before[name]:.4f} -> {record.after[name]:.4f} nats a token, held out")
    _print_check(report.verification)
    _print_end(report.seconds, report.output, report.bytes_written)


def _print_layers(plan: PrunePlan) -> None:
    deciding = plan.settings.get("scored_by")
    names = sorted(plan.scores, key=lambda name: (name != CKA_COLUMN_SUM, name != deciding))
    headers = {CKA_COLUMN_SUM: "CKA sum"}
    rows = []
    segment_of = {layer: number for number, segment in enumerate(plan.segments) for layer in segment.layers}
    for layer in range(plan.num_layers):
        scores = [f"{plan.scores[name][layer]:.4f}" for name in names]
        rows.append([str(layer), str(segment_of[layer]), *scores, "kept" if layer in plan.kept else "removed"])
    columns = ["layer", "segment", *(headers.get(name, name) for name in names), ""]
    print_table(
        f"{plan.source.name if plan.source else 'model'}: {plan.num_layers} decoder layers",
        columns,
        rows,
        range(len(columns) - 1),
    )


def _print_special(plan: PrunePlan) -> None:
    """What is special about the model's type."""
    for line in limits_of(plan):
        print(f"Limit             {line}")
    if isinstance(adapter := plan.settings.get("adapter"), str):
        print(f"Adapter           {adapter}")


def _print_compensation(plan: PrunePlan) -> None:
    report = plan.compensation
    if not plan.replaced and not report:
        return
    print(f"Compensation      {report.get('method', 'given')}, {len(plan.replaced)} tensors replaced")
    refined = report.get("refined")
    for name, stage in (("closed form", report), ("refined", refined if isinstance(refined, Mapping) else {})):
        # Plain data that may come from another program's plan: only what has the expected form is shown.
        losses = stage.get("losses")
        if isinstance(losses, Mapping) and losses and all(_is_change(each) for each in losses.values()):
            shown = (
                f"{str(part).replace('_', '-')} {each['without']:.4f} -> {each['with']:.4f}"
                for part, each in losses.items()
            )
            print(f"  {name:<16}loss in nats a token: {', '.join(shown)}")


def _is_change(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(end), float) for end in ("without", "with"))


def _removed(plan: PrunePlan) -> str:
    return f"{len(plan.removed)} of {plan.num_layers} layers: {' '.join(map(str, plan.removed))}"
