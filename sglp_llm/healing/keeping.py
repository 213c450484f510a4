"""What a training keeps on disk while it runs: its log, and the weights with the lowest held-out loss."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from sglp_llm.errors import UserError
from sglp_llm.plan.healing_recipe import LOG_FILE_NAME
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent
from sglp_llm.small_files import read_json, read_json_lines, replace_text
from sglp_llm.tensor_files.tensors import read_tensors, write_tensors

DIVERGED = 0.1
"""A run stops when its held-out loss is higher than at the start by this share of it: less may be noise of the first steps."""

CHECKPOINT_SHARE = 0.05
"""Checkpoints take at most this share of the time, after the first: of a large model one takes as long as many steps."""

_BEST_FILE_NAME = "best.safetensors"
_STATE_FILE_NAME = "held_out.json"

HeldOut = dict[str, float]
"""Means over the held-out sequences in nats a token: ``loss`` (what is trained on), ``next_token_loss``, and with a teacher
``divergence``."""


@dataclass(frozen=True)
class Training:
    """What training has done; the model holds the best weights.

    Attributes:
        steps: Optimizer steps that were planned.
        best_step: The step after which the held-out loss was lowest; 0 means that nothing was better than the start.
        before: Held-out losses at the start.
        after: Held-out losses with the best weights.
        stopped: Why it ended before the last step; ``None`` when it did not.
        log: One record a step, and one a measurement of the held-out losses.
    """

    steps: int
    best_step: int
    before: HeldOut
    after: HeldOut
    stopped: str | None
    log: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """Where and how a training runs; no result depends on it, but for rounding.

    Attributes:
        folder: For checkpoints, the log and the best weights; it exists.
        batch_size: Sequences computed at once by one process; the sequences of a step are a multiple of it times the number of
            processes.
        bfloat16: Whether matrices are multiplied in bfloat16.
        resume: Go on from the last checkpoint in the folder.
        report_to: transformers' names of experiment trackers, such as ``tensorboard``.
        progress: Called with the tokens that are done.
        processes: Those that share every step.
    """

    folder: Path
    batch_size: int
    bfloat16: bool = False
    resume: bool = False
    report_to: tuple[str, ...] = ()
    progress: Progress = silent
    processes: Processes = ALONE


def last_checkpoint(run: Run) -> Path | None:
    """The last checkpoint that is whole; later ones, which a kill or a full disk cut short, are removed.

    The Trainer writes ``trainer_state.json`` last.
    """
    checkpoints = {int(path.name.split("-")[1]): path for path in run.folder.glob("checkpoint-*")}
    for _, path in sorted(checkpoints.items(), reverse=True):
        try:
            read_json(path / TRAINER_STATE_NAME, "state of a training")
        except UserError:
            continue
        break
    else:
        path = None
    run.processes.wait()  # none is removed while another process looks for it
    for step, other in checkpoints.items():
        if run.processes.is_main and (path is None or step > int(path.name.split("-")[1])):
            shutil.rmtree(other, ignore_errors=True)
    return path


class Keeper(TrainerCallback):
    """Keeps the log and the weights with the lowest held-out loss, on disk, and stops a run that diverges or no longer gains.

    Args:
        model: What is trained.
        run: See `Run`.
        patience: See `HealingRecipe`.
        least_gain: See `HealingRecipe`.
    """

    def __init__(self, model: nn.Module, run: Run, patience: int | None = None, least_gain: float = 0.0) -> None:
        self._patience, self._least_gain = patience, least_gain
        self._parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._run = run
        self._log: list[dict[str, Any]] = []
        self._state: dict[str, Any] = {}
        self._stopped: str | None = None
        self._started = self._asked = self._saved = time.perf_counter()
        self._saving = 0.0

    def begin(self) -> None:
        """Forgets what an earlier run has left, or takes it up."""
        state, log = self._file(_STATE_FILE_NAME), self._file(LOG_FILE_NAME)
        if self._run.resume:
            self._state = read_json(state, "state of a training")
            self._log = read_json_lines(log, "log of a training")
        elif self._run.processes.is_main:
            for file in (state, log, self._file(_BEST_FILE_NAME)):
                file.unlink(missing_ok=True)

    def result(self, steps: int) -> Training:
        """What was found; the model gets the best weights."""
        if self._state["best_step"] > 0 and self._run.processes.is_main:
            with torch.no_grad():
                for name, value in read_tensors(self._file(_BEST_FILE_NAME)).items():
                    self._parameters[name].copy_(value)
        return Training(
            steps, self._state["best_step"], self._state["before"], self._state["best"], self._stopped, self._log
        )

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._log = [line for line in self._log if line["step"] <= state.global_step]

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        known = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_next_token_loss", "eval_divergence")
        line = {name: float(logs[name]) for name in known if name in logs}
        if line:
            seconds = round(time.perf_counter() - self._started, 3)
            self._log.append({"step": state.global_step, "seconds": seconds, **line})
            self._write(LOG_FILE_NAME, "".join(json.dumps(each) + "\n" for each in self._log))
        if not math.isfinite(line.get("loss", 0.0)):
            self._stop(control, f"the loss is not finite at step {state.global_step}")

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        found = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
        if "before" not in self._state:
            self._state = {"before": found, "best": found, "best_step": 0, "gained": (found["loss"], 0)}
        elif found["loss"] < self._state["best"]["loss"]:
            self._state |= {"best": found, "best_step": state.global_step}
            if self._run.processes.is_main:
                partial = self._file(_BEST_FILE_NAME + ".partial")
                write_tensors(partial, {name: each.detach() for name, each in self._parameters.items()})
                partial.replace(self._file(_BEST_FILE_NAME))
        elif not found["loss"] <= (1 + DIVERGED) * self._state["before"]["loss"]:
            before = self._state["before"]["loss"]
            self._stop(
                control,
                f"the held-out loss is {found['loss']:.4f} at step {state.global_step}, above {before:.4f} at the start",
            )
        self._stop_where_nothing_is_gained(control, found["loss"], state.global_step, args.eval_steps)
        self._write(_STATE_FILE_NAME, json.dumps(self._state))
        if state.global_step > 0 and self._stopped is None:
            self._asked = time.perf_counter()
            due = CHECKPOINT_SHARE * (self._asked - self._saved) >= self._saving
            control.should_save = self._run.processes.agreed(int(due)) > 0

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = time.perf_counter()
        self._saving = self._saved - self._asked

    def _stop_where_nothing_is_gained(self, control: TrainerControl, loss: float, step: int, every: int) -> None:
        """Counted in steps: a run that was interrupted measures again what it has measured."""
        lowest, since = self._state["gained"]
        if loss < (1 - self._least_gain) * lowest:
            self._state["gained"] = (loss, step)
        elif self._patience is not None and step - since >= self._patience * every:
            less = f" by {self._least_gain:.1%}" if self._least_gain else ""
            self._stop(control, f"the held-out loss has not fallen{less} since step {since}")

    def _stop(self, control: TrainerControl, why: str) -> None:
        self._stopped = self._stopped or why
        control.should_training_stop = True
        control.should_save = False

    def _file(self, name: str) -> Path:
        return self._run.folder / name

    def _write(self, name: str, text: str) -> None:
        if self._run.processes.is_main:
            replace_text(self._file(name), text)
