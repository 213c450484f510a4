"""What healing has done, as it is written beside the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sglp_llm.records import ModelIdentity

HEALING_FILE_NAME = "sglp_healing.json"


@dataclass(frozen=True)
class HealingRecord:
    """One training of a shortened model.

    Attributes:
        student: The shortened model.
        teacher: The model whose predictions were the target; ``None`` without one.
        data: The training text, with its split where it has one.
        data_hash: Of the token sequences and labels.
        sequences: Number of different training sequences.
        held_out: Number of held-out sequences.
        tokens: Tokens that were trained on until the best weights, repetitions included.
        steps: Optimizer steps that were planned.
        best_step: The step whose weights were kept.
        parameters: Number of trained parameters.
        before: Held-out losses at the start, nats a token: ``loss`` (what is minimised), ``next_token_loss``, and with a teacher
            ``divergence``.
        after: The same with the weights that were kept.
        stopped: Why training ended before the last step; ``None`` when it did not.
        settings: The healing recipe.
        versions: Versions of the software.
    """

    student: ModelIdentity
    teacher: ModelIdentity | None
    data: str
    data_hash: str
    sequences: int
    held_out: int
    tokens: int
    steps: int
    best_step: int
    parameters: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    stopped: str | None
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class HealReport:
    """What `heal` returns.

    Attributes:
        output: The folder that was written.
        record: What was done.
        log: One entry a step, and one a measurement of the held-out losses.
        bytes_written: Size of the folder's weight files; 0 in a process that left the writing to the main one.
        verification: What the reload check found, as plain data; ``None`` when it was switched off, or left to the main process.
        seconds: Wall time by stage.
    """

    output: str
    record: HealingRecord
    log: Sequence[Mapping[str, Any]]
    bytes_written: int
    verification: Mapping[str, Any] | None
    seconds: Mapping[str, float]
