"""Tiny checkpoints, functions that damage them, and the command line run in this process."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import typer
from helpers import TEXT, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sglp_llm.adapters import get_adapter
from sglp_llm.cli import main as cli

torch.set_num_threads(1)  # for models this small, more threads only add synchronisation

SMALL = ("--calibration", TEXT, "--samples", "4", "--seq-len", "16")
"""The smallest calibration that makes an analysis, on text that is the same with every Python."""

QUICK = ("--preset", "paper", *SMALL)
"""The paper's method with it."""

PLAN = {"num_layers": 6, "removed": [2, 4]}
"""A hand-written plan."""

Damage = Callable[[Path], object]
"""Changes the copy of a checkpoint in this folder."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message of a command that failed as it should: one line on stderr, nothing on stdout.

        A run that fails after its memory prediction has printed that before; it is left out.
        """
        lines = [line for line in self.err.splitlines() if not line.startswith("Memory: about ")]
        assert (len(lines), self.out) == (1, ""), (self.err, self.out)
        assert lines[0].startswith("sglp-llm: error: "), lines
        return lines[0].removeprefix("sglp-llm: error: ")


_command = cache(typer.main.get_command)
"""What Typer makes of the functions of the verbs before it parses anything: the same at every run."""


def run_cli(*arguments: object) -> Outcome:
    """Runs ``sglp-llm ARGUMENTS`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = patch.object(sys, "argv", ["sglp-llm", *map(str, arguments)])
    with argv, patch.object(typer.main, "get_command", _command), redirect_stdout(out), redirect_stderr(err):
        code = cli._run()
    return Outcome(code, out.getvalue(), err.getvalue())


def tiny_model(model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    """A model of a few thousand random parameters, the same ones at every call."""
    config = AutoConfig.for_model(model_type, **{**get_adapter(model_type).tiny_configs[0], **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def save_tiny(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """Saves `tiny_model` with a tokenizer."""
    tiny_model(model_type, **changes).save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    return folder


def copied(source: Path, folder: Path, damage: Damage = lambda _: None) -> Path:
    """A copy of a checkpoint, changed."""
    shutil.copytree(source, folder)
    damage(folder)
    return folder


def edited(name: str, /, **changes: Any) -> Damage:
    """Changes keys of a JSON file; None removes one."""

    def damage(folder: Path) -> None:
        data = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    return damage


def written(name: str, content: str | bytes) -> Damage:
    """Writes a file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def without(name: str) -> Damage:
    """Removes a file."""
    return lambda folder: (folder / name).unlink()


def in_turn(*damages: Damage) -> Damage:
    """One change after another."""
    return lambda folder: [damage(folder) for damage in damages]


def logits(folder: Path, skip: tuple[int, ...] = (), **options: Any) -> torch.Tensor:
    """Logits of plain transformers for a checkpoint on a fixed input, with some decoder layers skipped."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return logits_of(model, skip)


def logits_of(model: PreTrainedModel, skip: tuple[int, ...] = ()) -> torch.Tensor:
    """The model's logits on that input, ``[1, 12, vocabulary]``."""
    layers = model.get_submodule(get_adapter(model.config.model_type).layers)
    handles = [layers[index].register_forward_hook(lambda _, args, out: args[0]) for index in skip]
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(torch.arange(12)[None] + 3, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return result
