"""What a draft model gains, as text and as plain data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from sglp_llm.evaluation.benchmark import Measured
from sglp_llm.evaluation.drafting import Drafting, DraftSettings


def to_dict(found: Drafting, settings: DraftSettings, text: str) -> dict[str, Any]:
    """Everything, for ``--json``."""
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return {**asdict(found), "text": text, "settings": asdict(settings), "environment": environment}


def lines(found: Drafting, settings: DraftSettings, text: str) -> list[str]:
    """The result, a quantity a line."""
    same = f"equal to plain greedy generation after {found.equal} of {found.prompts} prompts"
    if found.equal < found.prompts:
        same += f": in {found.dtype} rounding breaks ties otherwise when several tokens are computed at once"
    return [
        f"Original     {found.original} ({found.dtype}, {found.device})",
        f"Draft        {found.draft}, {settings.draft_tokens} tokens a step",
        f"Prompts      {found.prompts} x {found.prompt_len} tokens of {text}, {settings.new_tokens} new ones each",
        f"Tokens       {same}",
        f"Acceptance   {found.acceptance_length:.2f} tokens a pass of the original, of at most {settings.draft_tokens + 1}; "
        f"{found.acceptance_rate:.0%} of the proposed ones accepted",
        f"Plain        {_rate(found.plain_tokens_per_second)}",
        f"With draft   {_rate(found.draft_tokens_per_second)}",
        f"Speed-up     {_spread(found.speed_up, '.2f')}",
    ]


def _rate(rate: Measured) -> str:
    return f"{_spread(rate, '.3g')} tokens/s, {len(rate.values)} rounds"


def _spread(value: Measured, form: str) -> str:
    return f"{value.median:{form}} ({value.lowest:{form}}..{value.highest:{form}})"
