"""A shortened checkpoint -> vLLM's configuration of speculative decoding with it as the draft model of its original."""

from __future__ import annotations

import json
import shlex
from importlib.util import find_spec
from pathlib import Path

from sglp_llm.checkpoint.publish_file import atomic_file, check_file
from sglp_llm.errors import UserError
from sglp_llm.models import find_source
from sglp_llm.onwards.exported import Exported
from sglp_llm.plan import load_plan

SPECULATIVE_FILE_NAME = "vllm_speculative.json"

_PROPOSED = 5


def export_vllm_draft(folder: Path, output: Path | None = None, overwrite: bool = False) -> Exported:
    """Writes what ``vllm serve --speculative-config`` takes.

    Args:
        folder: A folder that prune or heal has written.
        output: The file; by default ``vllm_speculative.json`` in the folder.
        overwrite: Replace the file if it exists.

    Raises:
        UserError: The folder holds no plan or no checkpoint, or its original is a GGUF file; or the output exists.
    """
    plan = load_plan(folder)
    path = output or folder / SPECULATIVE_FILE_NAME
    check_file(path, overwrite)
    if plan.source is None:
        raise UserError(f"{folder}: the plan does not name its model, which is the one to draft for")
    original = plan.source.name
    if original.endswith(".gguf"):
        raise UserError(
            f"{folder}: the plan's model {original} is a GGUF file, and is none that vLLM serves with a draft model"
        )
    find_source(folder)
    if (local := Path(original).expanduser()).exists():
        original = str(local.resolve())
    config = {"method": "draft_model", "model": str(folder.resolve()), "num_speculative_tokens": _PROPOSED}
    with atomic_file(path, overwrite) as partial:
        partial.write_text(f"{json.dumps(config, indent=2)}\n", encoding="utf-8")
    revision = [] if plan.revision is None else ["--revision", plan.revision]
    command = ["vllm", "serve", original, *revision, "--speculative-config", json.dumps(config)]
    notes = [f"what it gains: sglp-llm bench {shlex.quote(str(folder))} --draft-for {shlex.quote(original)}"]
    if find_spec("vllm") is None:
        notes.append("vLLM is not installed here, and the configuration was not tried: pip install vllm")
    return Exported((path,), tuple(notes), shlex.join(command))
