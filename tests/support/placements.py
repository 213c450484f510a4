"""Small models in the places that `pretended_devices` offers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import dispatch_model
from pretended_devices import PretendedDevices
from tiny_models import random_model
from transformers import PreTrainedModel

from sglp_llm.calibration import CalibrationSet
from sglp_llm.models import find_source
from sglp_llm.models.loading import DecoderModel, load_streamed, wrap_model

LAYERS = 4


def llama(layers: int = LAYERS) -> PreTrainedModel:
    return random_model(
        "llama",
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )


def calibration(sequences: int = 4, padded: bool = True) -> CalibrationSet:
    """The first of every four is padded where ``padded`` is true."""
    ids = torch.randint(3, 300, (sequences, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[::4, :5] = not padded
    return CalibrationSet(ids.masked_fill(~mask, 0), mask, "by hand", 0, "by hand", False)


@dataclass(frozen=True)
class Placed:
    """A model on pretended devices; only inside ``devices.pretended()``."""

    devices: PretendedDevices
    model: DecoderModel
    indices: tuple[int, ...] = (0,)


def one_gpu(folder: Path, layers: int = LAYERS) -> Placed:
    devices = PretendedDevices(1)
    with devices.pretended():
        return Placed(devices, wrap_model(llama(layers).to("cuda")))


def two_gpus(folder: Path) -> Placed:
    devices = PretendedDevices(2)
    with devices.pretended():
        return Placed(devices, wrap_model(spread(llama())), (0, 1))


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """The first two layers on one device, and the others, the norm and the head on another, by accelerate."""
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{index}": int(index >= 2) for index in range(model.config.num_hidden_layers)}
    return dispatch_model(model, places)


def streamed(folder: Path) -> Placed:
    devices = PretendedDevices(1)
    with devices.pretended():
        return Placed(devices, load_streamed(find_source(folder)))


def second_rank(folder: Path) -> Placed:
    """What torchrun's second process does: its current device is 1, and threads still begin on device 0."""
    devices = PretendedDevices(2, current=1)
    with devices.pretended():
        return Placed(devices, load_streamed(find_source(folder)), (1,))


def apple(folder: Path) -> Placed:
    """A live model on a device without float64."""
    devices = PretendedDevices(kind="mps")
    with devices.pretended():
        return Placed(devices, wrap_model(llama().to("mps")))
