"""Losses and divergences of a model without some layers: plain transformers runs it with layers that return their input."""

from __future__ import annotations

import torch
from calibration_sets import ids_and_mask
from tiny_models import Tiny, passed_through, tiny_model
from torch import nn

from sglp_llm.calibration import CalibrationSet
from sglp_llm.models.loading import DecoderModel, wrap_model


def wrapped(family: str) -> DecoderModel:
    return wrap_model(tiny_model(Tiny(family, 0)))


def mean_loss(model: DecoderModel, calibration: CalibrationSet, removed: tuple[int, ...]) -> float:
    """The mean of transformers' own loss of each sequence, run alone; the removed layers return their input."""
    losses = []
    with passed_through(model.layers, removed, model.model), torch.no_grad():
        for ids, mask in zip(calibration.input_ids, calibration.mask, strict=True):
            labels = ids.masked_fill(~mask, -100)[None]
            losses.append(float(model.model(**ids_and_mask(ids, mask), labels=labels, use_cache=False).loss))
    return sum(losses) / len(losses)


def mean_divergence(model: DecoderModel, calibration: CalibrationSet, removed: tuple[int, ...]) -> float:
    """KL(dense || pruned) by torch's own function, the mean over real positions, then over sequences."""
    divergences = []
    for ids, mask in zip(calibration.input_ids, calibration.mask, strict=True):
        with torch.no_grad():
            dense = model.model(**ids_and_mask(ids, mask), use_cache=False).logits[0, mask].log_softmax(-1)
            with passed_through(model.layers, removed, model.model):
                pruned = model.model(**ids_and_mask(ids, mask), use_cache=False).logits[0, mask].log_softmax(-1)
        divergences.append(float(nn.functional.kl_div(pruned, dense, log_target=True, reduction="batchmean")))
    return sum(divergences) / len(divergences)
