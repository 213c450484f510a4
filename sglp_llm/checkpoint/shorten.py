"""The configuration of a shortened model, and the check that transformers builds from it exactly what is left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from sglp_llm.adapters import DecoderAdapter
from sglp_llm.adapters.structure.config_keys import PREDICTORS, shortened, superseded
from sglp_llm.adapters.structure.wrappers import TEXT_KEY, is_wrapper, text_config
from sglp_llm.checkpoint.quantised import renumbered_modules
from sglp_llm.errors import UserError
from sglp_llm.models import Source
from sglp_llm.models.source import QUANTISED_KEYS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from sglp_llm.models.opened import OpenedModel


def shortened_values(config: PretrainedConfig, adapter: DecoderAdapter, kept: Sequence[int]) -> dict[str, Any]:
    """The configuration values that depend on the layers, the depth under ``adapter.depth_key`` included.

    Args:
        config: transformers' resolved configuration, where lists that the JSON may lack are filled in; of a multimodal wrapper
            the whole one, and the values are those of its nested one.
        adapter: The family's adapter.
        kept: Original indices of the kept layers, ascending.
    """
    config = text_config(config)
    values = shortened(config, adapter.depth_key, kept)
    special, depth = adapter.exceptions, int(getattr(config, adapter.depth_key))
    if len(kept) == depth:
        return values
    if special.scale_with_root:
        scale = float(getattr(config, special.scale_with_root))
        values[special.scale_with_root] = scale * math.sqrt(len(kept) / depth)
    return values


def shortened_json(source: Source, kept: Sequence[int]) -> dict[str, Any]:
    """What ``config.json`` of the shortened checkpoint holds.

    It changes as little as possible of the source's: older releases and other programs may read its other keys. Lists come from
    the resolved configuration, because the JSON may lack them and transformers would derive them anew, wrongly, from the new
    depth.

    Args:
        source: A source with a ``config.json``.
        kept: Original indices of the kept layers, ascending.
    """
    adapter = source.adapter
    values = shortened_values(source.config, adapter, kept)
    dropped = {*superseded(values), "auto_map"} - set(adapter.exceptions.keep_keys)
    raw = source.raw_config
    # Old wrappers have the keys of their decoder at the top.
    nested = raw.get(TEXT_KEY) if is_wrapper(source.config) else None
    whole, text = (raw, nested) if isinstance(nested, Mapping) else ({}, raw)
    config = {key: value for key, value in text.items() if key not in dropped}
    depth = values.pop(adapter.depth_key)
    depth_keys = {adapter.depth_key, "num_hidden_layers"} & set(config)
    config |= values | dict.fromkeys(depth_keys or {adapter.depth_key}, depth)
    if source.predictor_layers:
        config |= {key: 0 for key in PREDICTORS if config.get(key)}
    if whole:
        config = {**{key: value for key, value in whole.items() if key != "auto_map"}, TEXT_KEY: config}
    return _with_quantisation(config, source, kept)


def _with_quantisation(config: dict[str, Any], source: Source, kept: Sequence[int]) -> dict[str, Any]:
    """The same, in which the settings of a quantisation name the layers by their new indices."""
    if not source.quantised:
        return config
    changed = dict(config)
    for key, value in config.items():
        if key in QUANTISED_KEYS:
            changed[key] = renumbered_modules(value, source.adapter, kept, source.identity.name)
        elif key == TEXT_KEY and isinstance(value, Mapping):
            changed[key] = _with_quantisation(dict(value), source, kept)
    return changed


def check_shortened(model: OpenedModel, kept: Sequence[int]) -> None:
    """Proves, before weights are loaded, that a model with a derived adapter can be left with these layers.

    Args:
        model: The opened model.
        kept: Original indices of the kept layers, ascending.

    Raises:
        UserError: It cannot: a layer that must stay is removed, or transformers would build another model; see `prove`.
    """
    if broken := model.staying.broken_by(set(range(model.num_layers)) - set(kept)):
        raise UserError(f"{model.identity.name}: {broken}")
    if model.adapter.is_derived:
        _prove(model, kept)


def check_removable(model: OpenedModel, among: Sequence[int]) -> None:
    """Proves, before an analysis, that a model with a derived adapter can be left without the first, middle or last layer.

    They stand for the others: what is built by its index in a way that is not known here differs in one of them.

    Args:
        model: The opened model.
        among: The layers that may be removed, ascending.

    Raises:
        UserError: It cannot; see `prove`.
    """
    if not model.adapter.is_derived or not (single := model.staying.can_follow((), among)):
        return
    for layer in sorted({single[0], single[len(single) // 2], single[-1]}):
        try:
            _prove(model, [other for other in range(model.num_layers) if other != layer])
        except UserError as error:
            raise UserError(
                f"{error}; which layers can go together is not known before it is tried: choose them yourself, with --plan"
            ) from None


def _prove(model: OpenedModel, kept: Sequence[int]) -> None:
    from sglp_llm.adapters.structure.proof import prove

    source = model.source
    if source is not None and source.raw_config:
        stored = type(source.config)._decode_special_floats(shortened_json(source, kept))
        config = type(source.config).from_dict(stored)
    else:
        config = shortened_copy(model.config, model.adapter, kept)
    prove(model.config, config, model.adapter, kept, model.identity.name)


def shortened_copy(config: PretrainedConfig, adapter: DecoderAdapter, kept: Sequence[int]) -> PretrainedConfig:
    """A copy of a resolved configuration with the values of the shortened model, built anew as it is on loading."""
    whole = type(config)._decode_special_floats(config.to_dict())
    text = whole[TEXT_KEY] if is_wrapper(config) else whole
    values = {**text, **shortened_values(config, adapter, kept)}
    dropped = set(superseded(values)) - set(adapter.exceptions.keep_keys)
    values = {key: value for key, value in values.items() if key not in dropped}
    if text is not whole:
        values = {**whole, TEXT_KEY: values}
    copied: PretrainedConfig = type(config).from_dict(deepcopy(values))
    return copied
