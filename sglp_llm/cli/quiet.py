"""The first step of every verb."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any


def prepare() -> Any:
    """Silences the libraries' own progress bars and warnings, and returns the module `sglp_llm.cli.console`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars would fill a log file
        os.environ.setdefault("TQDM_MININTERVAL", "60")  # lm-eval shows its bars regardless
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of their own later releases
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from sglp_llm.cli import console

    return console
