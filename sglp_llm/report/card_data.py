"""The metadata at the top of a model card, with the keys and values that the Hub defines."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglp_llm.calibration.corpora import HUB_DATA_SETS
from sglp_llm.plan.published import HUB_ID, in_hub_cache, without_paths
from sglp_llm.records import PrunePlan

# The Hub knows adapter, finetune, merge and quantized, and none for a removal of layers: finetune is the nearest.
RELATION = "finetune"
CAUSAL, WRAPPER = "AutoModelForCausalLM", "AutoModelForImageTextToText"
_FROM_THE_SOURCE = ("license", "license_name", "license_link", "language")


def base_model(plan: PrunePlan) -> str | None:
    """The Hub id of the original model; ``None`` where it is not known to be on the Hub."""
    assert plan.source is not None
    if found := in_hub_cache(plan.source.name):
        return found[0]
    return plan.source.name if plan.revision is not None and HUB_ID.fullmatch(plan.source.name) else None


def loaded_by_of(plan: PrunePlan) -> str:
    """The class of transformers that loads the shortened model."""
    return WRAPPER if plan.settings.get("loaded_by") == WRAPPER else CAUSAL


def card_data(plan: PrunePlan, healing: Mapping[str, Any] | None, name: str, source_card: Path | None) -> str:
    """The metadata as YAML, without the lines around it.

    Args:
        plan: What was done.
        healing: The record of the training after it, as plain data.
        name: Of the shortened model, in its results.
        source_card: The model card of the source, which license and language come from, where there is one.
    """
    from huggingface_hub import ModelCardData

    base, results = base_model(plan), _results(plan, healing)
    text = f"{plan.settings.get('calibration', '')} {healing['data'] if healing else ''}"
    data = ModelCardData(
        base_model=base,
        base_model_relation=RELATION if base else None,
        library_name="transformers",
        pipeline_tag="text-generation" if loaded_by_of(plan) == CAUSAL else "image-text-to-text",
        tags=["sglp-llm", "depth-pruning"],
        datasets=_hub_data_sets(text) or None,
        **_inherited(source_card),
        **({"model_name": name, "eval_results": results} if results else {}),
    )
    return str(data.to_yaml())


def _hub_data_sets(text: str) -> list[str]:
    """The data sets on the Hub that a specification of text names."""
    words = re.findall(r"(?<!\S)[a-z0-9-]+(?=[:\s]|$)", text)
    return sorted({HUB_DATA_SETS[word] for word in words if word in HUB_DATA_SETS})


def _inherited(card: Path | None) -> dict[str, Any]:
    """License and language of another card; what is damaged or of another type is left out."""
    from huggingface_hub import metadata_load

    try:
        data = (metadata_load(card) if card is not None and card.is_file() else None) or {}
    except Exception:  # whatever is wrong with another's card, it is no reason to fail
        return {}
    return {
        key: data[key]
        for key in _FROM_THE_SOURCE
        if (isinstance(data.get(key), str) and data[key])
        or (isinstance(data.get(key), list) and all(isinstance(each, str) for each in data[key]))
    }


def _results(plan: PrunePlan, healing: Mapping[str, Any] | None) -> list[Any]:
    """What the run has measured on text that nothing was fitted to or trained on: at most one perplexity."""
    from huggingface_hub import EvalResult

    if healing is not None:
        text, tokens, loss = (
            str(healing["data"]),
            healing["settings"].get("seq_len"),
            healing["after"]["next_token_loss"],
        )
    else:
        losses = plan.compensation.get("losses")
        held_out = losses.get("held_out") if isinstance(losses, Mapping) else None
        loss = held_out.get("with") if isinstance(held_out, Mapping) else None
        text, tokens = str(plan.settings.get("calibration", "")), plan.settings.get("seq_len")
    if not isinstance(loss, float) or not text or not loss < 700:  # exp of more is no float
        return []
    sets = _hub_data_sets(text)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=sets[0] if len(sets) == 1 else "text",
            dataset_name=without_paths(text),
            metric_type="perplexity",
            metric_value=round(math.exp(loss), 4),
            metric_name=f"Perplexity, held-out sequences of {tokens} tokens",
        )
    ]
