"""What a verb says on stderr, and the first step of every verb."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

_quiet = False


def prepare(quiet: bool = False) -> Any:
    """Silences the libraries' own progress bars and warnings, and returns the module `sglp_llm.cli.console`.

    Args:
        quiet: Whether `say` and the progress bars say nothing either, until the next call.
    """
    global _quiet
    _quiet = quiet
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars would fill a log file
        os.environ.setdefault("TQDM_MININTERVAL", "60")  # lm-eval shows its bars regardless
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of their own later releases
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from sglp_llm.cli import console

    return console


def is_quiet() -> bool:
    """Whether the verb that runs was asked for no progress and no forecasts."""
    return _quiet


def say(line: str) -> None:
    """Prints a line on stderr, unless the verb is quiet."""
    if not _quiet:
        print(line, file=sys.stderr)
