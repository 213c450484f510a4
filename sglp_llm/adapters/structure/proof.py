"""Compares a shortened model with the original on the meta device: what stays must be built exactly as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sglp_llm.adapters.base import DecoderAdapter
from sglp_llm.adapters.structure.config_keys import FIRST_INDEX, LAYER_KINDS, renumbered
from sglp_llm.adapters.structure.derive import empty_model
from sglp_llm.adapters.structure.wrappers import text_config
from sglp_llm.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

_NOT_COMPARED = {
    "training",
    "all_tied_weights_keys",
    "name_or_path",
}  # the names of tied weights hold indices of layers
_PLAIN = (bool, int, float, str, type(None))


def prove(
    original: PretrainedConfig, shortened: PretrainedConfig, adapter: DecoderAdapter, kept: Sequence[int], name: str
) -> None:
    """Builds both models without weights and compares the kept layers, and everything outside the layers.

    Compared are the classes of modules, the names, shapes and dtypes of parameters and buffers, the values of buffers, and the
    attributes of modules that are plain data. Attributes that hold a layer's index must follow the layers, those that hold a
    configuration value may follow the configuration.

    Args:
        original: The resolved configuration of the original.
        shortened: That of the shortened model.
        adapter: The derived adapter.
        kept: Original indices of the kept layers, ascending.
        name: Of the model, for the message.

    Raises:
        UserError: The shortened model differs in more than its depth: with these layers removed, transformers would build
            another model than is left.
    """
    before, after = empty_model(original), empty_model(shortened)
    layers, fewer = before.get_submodule(adapter.layers), after.get_submodule(adapter.layers)
    if len(fewer) != len(kept):
        raise UserError(f"{name}: transformers would build {len(fewer)} decoder layers instead of {len(kept)}")
    original, shortened = text_config(original), text_config(shortened)
    changed = _changed_values(original, shortened)

    def is_setting(key: str, value: Any, other: Any) -> bool:
        if key in FIRST_INDEX:
            return bool(renumbered(key, value, 0, kept) == other)
        if key in LAYER_KINDS and isinstance(value, list | tuple) and isinstance(other, list | tuple):
            return set(other) <= set(value)  # of a module that holds each kind of layer once
        if isinstance(value, dict) and isinstance(other, dict):
            if other.items() <= value.items():
                return True  # an entry for each kind of layer
            if other == {kept.index(layer): entry for layer, entry in value.items() if layer in kept}:
                return True  # an entry for each layer
        return any(_same(value, old) and _same(other, new) for old, new in changed)

    for new, old in enumerate(kept):

        def follows(key: str, value: Any, other: Any, old: int = old) -> bool:
            if key in adapter.exceptions.flags:
                return True
            if isinstance(value, int):
                return bool(renumbered(key, value, old, kept) == other) or (
                    getattr(original, key, None) == value and getattr(shortened, key, None) == other
                )
            return isinstance(value, list | tuple | dict) and is_setting(key, value, other)

        if difference := _difference(layers[old], fewer[new], follows):
            raise UserError(
                f"{name}: layer {old} cannot become layer {new}: transformers would build it otherwise ({difference}); "
                "remove other layers"
            )
    if difference := _difference(before, after, is_setting, except_path=adapter.layers, fused=adapter.exceptions.fused):
        raise UserError(
            f"{name}: with these layers removed, transformers would build the rest of the model otherwise ({difference})"
        )


def _difference(
    before: nn.Module,
    after: nn.Module,
    may_differ: Callable[[str, Any, Any], bool],
    except_path: str | None = None,
    fused: Collection[str] = (),
) -> str:
    """The first difference of two modules, as text; empty where there is none."""
    ours, theirs = (dict(_modules(module, except_path)) for module in (before, after))
    if set(ours) != set(theirs):
        odd = min(set(ours) ^ set(theirs))
        return f"module {odd!r} is only in {'the original' if odd in ours else 'the shortened model'}"
    for path, module in ours.items():
        other, where = theirs[path], path or "the module"
        if type(module) is not type(other):
            return f"{where}: {type(module).__name__}, then {type(other).__name__}"
        for kind in ("_parameters", "_buffers"):
            tensors, others = getattr(module, kind), getattr(other, kind)
            # A rotary embedding holds buffers for the kinds of layers that there are.
            computed = module._non_persistent_buffers_set
            unlike = sorted({*(set(others) - set(tensors)), *(set(tensors) - set(others) - computed)})
            if unlike:
                return f"{where}: {unlike[0]} is in one of them only"
            for key in others:
                full = f"{path}.{key}" if path else key
                if full not in fused and not _equal(tensors[key], others[key], key in computed):
                    return f"{full} differs"
        ours_plain, theirs_plain = dict(_attributes(module)), dict(_attributes(other))
        for key in {**ours_plain, **theirs_plain}:
            value, changed = ours_plain.get(key), theirs_plain.get(key)
            if key not in theirs_plain or f"{path}.weight" in fused:
                continue
            if not _same(value, changed) and not may_differ(key, value, changed):
                return f"{where}: {key} is {_show(value)}, then {_show(changed)}"
    return ""


def _modules(module: nn.Module, except_path: str | None) -> Iterator[tuple[str, nn.Module]]:
    for path, each in module.named_modules(remove_duplicate=False):
        if except_path is None or not (path == except_path or path.startswith(f"{except_path}.")):
            yield path, each


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of a module that are plain data, its class's defaults for hooks and the like left out."""
    for key, value in vars(module).items():
        if not key.startswith("_") and key not in _NOT_COMPARED and _is_plain(value):
            yield key, value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(each) for each in value)
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(each) for key, each in value.items())
    return isinstance(value, _PLAIN)


def _equal(one: torch.Tensor | None, other: torch.Tensor | None, computed: bool) -> bool:
    """Whether two tensors are the same; of stored ones the values do not count, since they are loaded."""
    import torch

    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return not computed or one.is_meta or other.is_meta or torch.equal(one, other)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return type(one) is type(other) and bool(one == other)


def _changed_values(original: PretrainedConfig, shortened: PretrainedConfig) -> list[tuple[Any, Any]]:
    """The values of configuration keys that differ, computed ones such as ``num_hidden_layers`` of another name included."""
    before, after = original.to_dict(), shortened.to_dict()
    pairs = [(before.get(key), after.get(key)) for key in {**before, **after}]
    return [(one, other) for one, other in pairs if not _same(one, other)]


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
