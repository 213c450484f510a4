"""``--record``: measurements of a shortened checkpoint, beside those of its original, go into its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sglp_llm.cli import panels
from sglp_llm.errors import UserError
from sglp_llm.records import PrunePlan

if TYPE_CHECKING:
    from sglp_llm.evaluation.benchmark import BenchmarkSettings, ModelBenchmark
    from sglp_llm.evaluation.side_by_side import Row
    from sglp_llm.models.opened import OpenedModel

Record = Annotated[
    bool,
    typer.Option(
        "--record",
        help="Measure the original too, and keep both in MODEL's folder: sglp_results.json, model card, report.html.",
        rich_help_panel=panels.OUTPUT,
    ),
]


@dataclass(frozen=True)
class RecordingFolder:
    """The folder of a shortened checkpoint.

    Attributes:
        path: The folder.
        plan: Its plan, which names the original.
    """

    path: Path
    plan: PrunePlan

    @property
    def original(self) -> tuple[str, str | None]:
        """The original's name, and its revision on the Hub."""
        assert self.plan.source is not None
        return self.plan.source.name, self.plan.revision

    def check_original(self, opened: OpenedModel) -> None:
        """Checks that a model is the one that the plan was made for.

        Raises:
            UserError: It is another.
        """
        assert self.plan.source is not None
        if opened.identity.fingerprint != self.plan.source.fingerprint:
            raise UserError(
                f"--record compares with the original, and {opened.identity.name} is not the model that {self.path} was "
                f"made from ({self.plan.source.name}): give that one as --baseline"
            )

    def keep_scores(self, rows: Sequence[Row], conditions: str) -> None:
        """Adds scores.

        Args:
            rows: The model's scores beside the original's.
            conditions: What all of them depend on.
        """
        from sglp_llm.plan.results import Result
        from sglp_llm.report.recorded import record

        results = []
        for row in rows:
            score, before = row.score, row.baseline
            results.append(
                Result(
                    name=score.task,
                    metric=score.metric,
                    conditions=conditions,
                    value=score.value,
                    stderr=score.stderr,
                    original=None if before is None else before.value,
                    original_stderr=None if before is None else before.stderr,
                    higher_is_better=score.higher_is_better,
                )
            )
        record(self.path, results)

    def keep_speeds(self, original: ModelBenchmark, model: ModelBenchmark, settings: BenchmarkSettings) -> None:
        """Adds the medians of a benchmark's times, and the peaks of memory."""
        from sglp_llm.plan.results import Result
        from sglp_llm.report.recorded import record

        where = f"{model.dtype}, {model.device}"
        results = []
        for before, after in zip(original.speeds, model.speeds, strict=True):
            conditions = f"{settings.prompt_len} + {settings.new_tokens} tokens, batch {after.batch}, {where}"
            for name, metric, higher in (
                ("first_token_seconds", "seconds to the first token", False),
                ("prefill_tokens_per_second", "prefill tokens a second", True),
                ("decode_tokens_per_second", "decoded tokens a second", True),
            ):
                medians = [getattr(each, name).median for each in (after, before)]
                results.append(Result("speed", metric, conditions, medians[0], None, medians[1], None, higher))
        peaks = [("host", original.peak_host_bytes, model.peak_host_bytes)]
        peaks.append(("GPU", original.peak_device_bytes, model.peak_device_bytes))
        for what, first, second in peaks:
            if first is not None and second is not None:
                results.append(
                    Result("memory", f"peak {what} memory, GB", where, second / 1e9, None, first / 1e9, None, False)
                )
        record(self.path, results)


def folder_to_record(model: str) -> RecordingFolder:
    """The folder that ``--record`` writes to, checked before anything is measured.

    Raises:
        UserError: It is no folder with a plan that names its original.
    """
    from sglp_llm.plan import PLAN_FILE_NAME, load_plan

    path = Path(model).expanduser()
    if not (path / PLAN_FILE_NAME).is_file():
        raise UserError(f"--record keeps results in a folder that prune or heal has written, and {model} is none")
    plan = load_plan(path)
    if plan.source is None:
        raise UserError(f"{path / PLAN_FILE_NAME}: does not name the original model, which --record compares with")
    return RecordingFolder(path, plan)
