"""Multimodal wrappers: models whose configuration holds that of a decoder for text, beside a vision tower's or others."""

from __future__ import annotations

from typing import Any

TEXT_KEY = "text_config"
"""The key of the nested configuration."""


def is_wrapper(config: Any) -> bool:
    """Whether ``AutoModelForImageTextToText`` loads such a model, and its decoder has a configuration of its own."""
    if not hasattr(getattr(config, TEXT_KEY, None), "model_type"):
        return False
    return loads_images(config.model_type)


def loads_images(model_type: str) -> bool:
    """Whether ``AutoModelForImageTextToText`` knows the type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def text_config(config: Any) -> Any:
    """The configuration of the decoder: the nested one of a wrapper, otherwise the same."""
    return getattr(config, TEXT_KEY) if is_wrapper(config) else config


def auto_class(config: Any) -> Any:
    """The class of transformers that builds and loads such a model."""
    import transformers

    return transformers.AutoModelForImageTextToText if is_wrapper(config) else transformers.AutoModelForCausalLM


def pinned_by_vision(config: Any) -> dict[int, str]:
    """Decoder layers that must stay because something of an image enters behind them: layer -> why."""
    depths = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None)
    reason = "features of an image are added behind it (deepstack_visual_indexes)"
    return dict.fromkeys(range(len(depths or ())), reason)
