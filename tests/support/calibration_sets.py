"""Calibration sets made by hand, with and without padding."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from sglp_llm.calibration import CalibrationSet
from sglp_llm.models.loading import DecoderModel


def plain_set(sequences: int, tokens: int = 24) -> CalibrationSet:
    """Random tokens without padding."""
    ids = torch.randint(3, 300, (sequences, tokens), generator=torch.Generator().manual_seed(2))
    return CalibrationSet(ids, torch.ones_like(ids, dtype=torch.bool), "by hand", 0, "by hand", False)


def padded_set(sequences: int, side: Literal["left", "right"], tokens: int = 24) -> CalibrationSet:
    """Every third sequence is whole, the others are padded by 5 or 10 tokens."""
    whole = plain_set(sequences, tokens)
    mask = whole.mask.clone()
    for row in range(sequences):
        padding = 5 * (row % 3)
        mask[row, :padding] = False
    if side == "right":
        mask = mask.flip(1)
    return CalibrationSet(whole.input_ids.masked_fill(~mask, 0), mask, "by hand", 0, "by hand", False)


def ids_and_mask(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """One sequence as a batch of its own, for a transformers model."""
    return {"input_ids": ids[None], "attention_mask": mask[None].long()}


def labels_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Labels of one sequence for transformers' loss: neither padding nor the first real token is predicted."""
    labels = ids.masked_fill(~mask, -100)
    labels[mask.nonzero()[0]] = -100
    return labels[None]


def sampled_set(model: nn.Module, sequences: int, padding: Literal["left", "right"] | None = None) -> CalibrationSet:
    """Sequences sampled from the model itself, so that removing layers raises their loss; padded as in `padded_set`."""
    ids = torch.randint(3, 300, (sequences, 1), generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        while ids.shape[1] < 24:
            chances = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(dim=-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    mask = plain_set(sequences).mask if padding is None else padded_set(sequences, padding).mask
    return CalibrationSet(ids.masked_fill(~mask, 0), mask, "by itself", 0, "by itself", False)


def mean_loss(model: DecoderModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """transformers' own of one sequence; the first real token has nothing real in front of it to be predicted from."""
    labels = labels_of(ids, mask)
    loss: torch.Tensor = model.model(**ids_and_mask(ids, mask), labels=labels, use_cache=False).loss
    return loss
