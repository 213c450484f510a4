"""PrunePlan <-> mergekit's YAML for ``merge_method: passthrough``, whose slices name half-open ranges of kept layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import yaml

from sglp_llm.errors import UserError
from sglp_llm.plan.plan_fields import typed
from sglp_llm.plan.plans import plan_from_indices
from sglp_llm.records import PrunePlan

# A plan's tensors are copied as they are stored, so it has no use for the dtypes, nor for a choice among several tokenizers.
_IGNORED = {"dtype", "out_dtype", "tokenizer_source", "base_model"}


def plan_from_mergekit(data: object, num_layers: int, where: str) -> PrunePlan:
    """The plan that keeps the layers of the slices.

    Args:
        data: The decoded YAML.
        num_layers: Depth of the model, which the YAML does not say.
        where: File name for messages.

    Raises:
        UserError: It does more than leave layers of one model out: repeats or reorders layers, takes them from two models, scales
            weights, or merges by another method.
    """
    config = typed(data, dict, where, "a mergekit configuration", "'key: value' lines")
    _only(config, {"slices", "merge_method"} | _IGNORED, where)
    if (method := config.get("merge_method")) != "passthrough":
        raise UserError(f"{where}: merge_method must be passthrough, not {method!r}: a plan merges no weights")
    slices = typed(config.get("slices"), list, where, "slices", "a list")
    sources = [_source(entry, f"{where}: slices[{index}]") for index, entry in enumerate(slices)]
    for model, _ in sources:
        if model != sources[0][0]:
            raise UserError(f"{where}: a plan is for one model, and the slices name {sources[0][0]!r} and {model!r}")
    for _, (_, stop) in sources:
        if stop > num_layers:
            raise UserError(f"{where}: a layer_range ends at {stop}, and the model has {num_layers} decoder layers")
    for (_, (_, stop)), (_, (start, _)) in pairwise(sources):
        if start < stop:
            raise UserError(
                f"{where}: a layer_range starts at {start} after one that ends at {stop}: a plan removes layers, and neither "
                "repeats nor reorders them"
            )
    kept = {layer for _, ends in sources for layer in range(*ends)}
    return plan_from_indices(num_layers, [layer for layer in range(num_layers) if layer not in kept])


def mergekit_yaml(plan: PrunePlan, model: str) -> str:
    """The YAML with which ``mergekit-yaml`` leaves out the plan's removed layers. Replaced tensors are not in it.

    Args:
        plan: The plan.
        model: Hub id or folder of the original, ``ID@REVISION`` for a commit.
    """
    starts = [layer for layer in plan.kept if layer - 1 not in plan.kept]
    stops = [layer + 1 for layer in plan.kept if layer + 1 not in plan.kept]
    quoted = yaml.safe_dump(model, width=10_000).removesuffix("\n...\n").strip()
    lines = ["merge_method: passthrough", "slices:"]
    for start, stop in zip(starts, stops, strict=True):
        lines += ["  - sources:", f"      - model: {quoted}", f"        layer_range: [{start}, {stop}]"]
    return "\n".join(lines) + "\n"


def _source(entry: object, where: str) -> tuple[object, tuple[int, int]]:
    """Model and half-open range of layers of a slice."""
    fields = typed(entry, dict, where, "a slice", "a mapping with sources")
    _only(fields, {"sources", "base_model"}, where)
    sources = typed(fields.get("sources"), list, where, "sources", "a list")
    if len(sources) != 1:
        raise UserError(f"{where}: {len(sources)} sources; a plan takes each layer from one model")
    source = typed(sources[0], dict, where, "a source", "a mapping with model and layer_range")
    _only(source, {"model", "layer_range"}, where)
    model = source.get("model")
    if not model or "+" in str(model) or (isinstance(model, Mapping) and model.get("lora")):
        raise UserError(f"{where}: model must name one model without a LoRA, not {model!r}")
    ends = source.get("layer_range")
    if not isinstance(ends, Sequence) or len(ends) != 2 or any(type(end) is not int for end in ends):
        raise UserError(f"{where}: layer_range must be [start, stop], half open, not {ends!r}")
    if not 0 <= ends[0] < ends[1]:
        raise UserError(f"{where}: layer_range {list(ends)} holds no layer; it is [start, stop], half open, from 0")
    return model, (ends[0], ends[1])


def _only(fields: Mapping[object, object], allowed: set[str], where: str) -> None:
    """Refuses keys that do more than leave layers out."""
    if other := [key for key in fields if key not in allowed]:
        raise UserError(
            f"{where}: {str(other[0])!r} is more than a plan can do, which only removes layers: leave it out"
        )
