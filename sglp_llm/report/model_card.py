"""The README.md of a shortened checkpoint: the base model, what was removed, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglp_llm.plan import PLAN_FILE_NAME
from sglp_llm.plan.plans import TENSORS_SUFFIX
from sglp_llm.records import PrunePlan


def write_model_card(path: Path, plan: PrunePlan, healing: Mapping[str, Any] | None = None) -> None:
    """Writes a short model card with the Hub's metadata.

    Args:
        path: The file to write.
        plan: What was done; its ``source`` names the base model.
        healing: The record of the training after it, as plain data.
    """
    assert plan.source is not None
    on_hub = plan.revision is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", plan.source.name)
    # A local path would be a broken link on the Hub, and may be private.
    name = plan.source.name if on_hub else Path(plan.source.name).name
    base = f"base_model: {name}\n" if on_hub else ""
    link = f"[{name}](https://huggingface.co/{name})" if on_hub else f"`{name}`"
    settings = plan.settings
    how = f"the criterion `{settings['criterion']}`" if "criterion" in settings else "a plan that was given"
    if "calibration" in settings:
        how += f" on {settings['samples']} x {settings['seq_len']} tokens of `{settings['calibration'].split(':')[0]}`"
    rest = "the cuts repaired" if plan.replaced else "nothing retrained"
    if healing is not None:
        rest = "the rest retrained"
    path.write_text(
        f"""---
{base}library_name: transformers
pipeline_tag: text-generation
tags:
- sglp-llm
- depth-pruning
---

# {name}, {len(plan.kept)} of {plan.num_layers} decoder layers

{link} with {len(plan.removed)} of its {plan.num_layers} decoder layers removed by sglp-llm and {rest}.

- Removed layers (0-based, of the original): {", ".join(map(str, plan.removed))}
- Chosen by {how}
{_compensation(plan)}{_healing(healing)}- Everything that led to the choice: `sglp_plan.json`; the settings: `sglp_recipe.yaml`

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
""",
        encoding="utf-8",
    )


def _compensation(plan: PrunePlan) -> str:
    """One line of the list, or nothing."""
    if not plan.replaced:
        return ""
    # Plain data that may come from another program's plan: only what has the expected form is shown.
    method = plan.compensation.get("method")
    how = f"by `{method}`" if isinstance(method, str) else "by tensors that came with the plan"
    cuts = plan.compensation.get("cuts")
    if isinstance(cuts, list | tuple) and cuts and all(_is_cut(cut) for cut in cuts):
        how += " for the cuts " + ", ".join(f"{cut['start']}..{cut['stop'] - 1}" for cut in cuts)
    file = Path(PLAN_FILE_NAME).with_suffix(TENSORS_SUFFIX)
    return f"- Compensated {how}: {len(plan.replaced)} tensors of layers that stay are new (`{file}`)\n"


def _healing(record: Mapping[str, Any] | None) -> str:
    """Lines of the list, or nothing."""
    if record is None:
        return ""
    settings, before, after = record["settings"], record["before"], record["after"]
    teacher = "the next token" if record["teacher"] is None else "the original model's predictions"
    return (
        f"- Retrained on {teacher}: {record['tokens']:,} tokens of `{without_paths(record['data'])}`, "
        f"`train: {settings['train']}` ({record['parameters']:,} parameters)\n"
        f"- Held-out next-token loss {before['next_token_loss']:.4f} -> {after['next_token_loss']:.4f} nats a token: "
        "`sglp_healing.json`, `train_log.jsonl`\n"
    )


def without_paths(specification: str) -> str:
    """Of files only their names are said."""
    return " ".join(Path(part).name if "/" in part else part for part in specification.split())


def _is_cut(value: object) -> bool:
    return isinstance(value, Mapping) and all(type(value.get(end)) is int for end in ("start", "stop"))
