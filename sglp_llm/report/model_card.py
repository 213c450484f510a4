"""The README.md of a shortened checkpoint: the base model, what was removed, the numbers, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglp_llm.plan import PLAN_FILE_NAME
from sglp_llm.plan.plans import TENSORS_SUFFIX
from sglp_llm.plan.published import PLACE, last_part, without_paths
from sglp_llm.records import PrunePlan
from sglp_llm.report.card_data import base_model, card_data, loaded_by_of
from sglp_llm.report.contents import gains_of, limits_of, sizes_of
from sglp_llm.report.recorded import RESULTS_PLACE


def write_model_card(
    path: Path, plan: PrunePlan, source_card: Path | None, healing: Mapping[str, Any] | None = None
) -> None:
    """Writes a model card with the Hub's metadata. It holds no path: a card is made to be published.

    Args:
        path: The file to write.
        plan: What was done; its ``source`` names the base model.
        source_card: The model card of the source, which license and language come from, where there is one.
        healing: The record of the training after it, as plain data.
    """
    assert plan.source is not None
    base = base_model(plan)
    name = base or last_part(plan.source.name)
    link = f"[{name}](https://huggingface.co/{name})" if base else f"`{name}`"
    data = card_data(plan, healing, f"{name.split('/')[-1]}-{len(plan.kept)}-of-{plan.num_layers}-layers", source_card)
    settings = plan.settings
    how = f"the criterion `{settings['criterion']}`" if "criterion" in settings else "a plan that was given"
    if "calibration" in settings:
        text = without_paths(str(settings["calibration"]))
        size = [settings.get(name) for name in ("samples", "seq_len")]
        amount = f"{size[0]} x {size[1]} tokens of " if all(type(each) is int for each in size) else ""
        how += f" on {amount}`{text}`"
    loaded_by = loaded_by_of(plan)
    special = f"{_special(plan)}{_compensation(plan)}{_healing(healing)}"
    rest = "the cuts repaired" if plan.replaced else "nothing retrained"
    if healing is not None:
        rest = "the rest retrained"
    path.write_text(
        f"""---
{data}
---

# {name}, {len(plan.kept)} of {plan.num_layers} decoder layers

{link} with {len(plan.removed)} of its {plan.num_layers} decoder layers removed by sglp-llm and {rest}.

- Removed layers (0-based, of the original): {", ".join(map(str, plan.removed))}
- Chosen by {how}
{special}- Everything that led to the choice: `sglp_plan.json`; the settings: `sglp_recipe.yaml`
{_numbers(plan, healing)}
{RESULTS_PLACE[0]}
{RESULTS_PLACE[1]}

## How to load it

It is a plain checkpoint of the family `{plan.source.model_type}`, only shorter: nothing but transformers is needed.

```python
from transformers import {loaded_by}, AutoTokenizer

model = {loaded_by}.from_pretrained("{PLACE}")
tokenizer = AutoTokenizer.from_pretrained("{PLACE}")
```

With [vLLM](https://docs.vllm.ai), which was not tried when this card was written, and scored with
[lm-eval](https://github.com/EleutherAI/lm-evaluation-harness):

```sh
vllm serve {PLACE}
lm_eval --model hf --model_args pretrained={PLACE} --tasks arc_easy,piqa,gsm8k
```

## Limits

- What the model writes suffers before what it classifies does: arithmetic, code and copying fail at depths where multiple choice
  still looks well, and training brings back less of them ([arXiv 2602.01997](https://arxiv.org/abs/2602.01997)). An example:
  SmolLM2-135M-Instruct without 3 of its 30 layers, and nothing trained, gets 3 % of sums right instead of 28 %, and 61 % of
  simple facts instead of 82 %. Measure what you need, generation above all.
- Perplexity and tasks that are not named here were not measured. The limits and biases of {link} are this model's too.
""",
        encoding="utf-8",
    )


def _numbers(plan: PrunePlan, healing: Mapping[str, Any] | None) -> str:
    """Tables of the sizes and of what each step gained, or nothing."""
    text = ""
    if sizes := sizes_of(plan):
        rows = "".join(f"| {what} | {before} | {after} |\n" for what, before, after in sizes)
        text += f"\n| | the original | this model |\n|---|---|---|\n{rows}"
    if gains := gains_of(plan, healing or {}):
        rows = "".join(f"| {gain.step} | {gain.quantity} | {gain.before:.4f} | {gain.after:.4f} |\n" for gain in gains)
        text += f"\n| step | nats a token | without it | with it |\n|---|---|---|---|\n{rows}"
    return text


def _special(plan: PrunePlan) -> str:
    """Lines of the list on the model's type, or nothing."""
    lines = [f"Had to stay: {line}" for line in limits_of(plan)]
    if isinstance(adapter := plan.settings.get("adapter"), str):
        lines.append(f"Adapter: {adapter} (`{plan.source.model_type if plan.source else ''}` has no file in sglp-llm)")
    return "".join(f"- {line}\n" for line in lines)


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


def _is_cut(value: object) -> bool:
    return isinstance(value, Mapping) and all(type(value.get(end)) is int for end in ("start", "stop"))
