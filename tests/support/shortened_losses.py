"""Losses of a shortened model by plain transformers."""

from __future__ import annotations

import numpy as np
import torch
from calibration_sets import ids_and_mask, labels_of

from sglp_llm.calibration import CalibrationSet, split
from sglp_llm.engine.modes import skipped
from sglp_llm.models.loading import DecoderModel


def mean_losses(model: DecoderModel, calibration: CalibrationSet, removed: tuple[int, ...]) -> dict[str, float]:
    """The mean loss of each part's sequences, by plain transformers on the real tokens alone."""
    losses = []
    with torch.no_grad(), skipped(model.layers, removed):
        for ids, mask in zip(calibration.input_ids, calibration.mask, strict=True):
            labels = labels_of(ids, mask)
            losses.append(float(model.model(**ids_and_mask(ids, mask), labels=labels, use_cache=False).loss))
    parts = split(len(losses), 0.25)
    return {name: float(np.mean([losses[index] for index in part])) for name, part in parts.items()}
