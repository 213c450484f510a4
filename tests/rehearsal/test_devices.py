"""Every criterion and every compensation on pretended devices: nothing mixes devices, and the values are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from pretended_devices import PretendedDevices
from tiny_models import random_model, save_tiny
from transformers import PreTrainedModel

from sglp_llm.analysis.observing import observe
from sglp_llm.calibration import CalibrationSet
from sglp_llm.compensation import FitSettings, compensation_names, get_method
from sglp_llm.criteria import ScoreCriterion, SetCriterion, criterion_names
from sglp_llm.models import find_source
from sglp_llm.models.loading import DecoderModel, load_streamed, wrap_model
from sglp_llm.plan import Recipe

LAYERS = 5
STEPS = [
    *(("criterion", name) for name in criterion_names()),
    *(("compensation", name) for name in compensation_names()),
]
"""Whatever the registries hold."""


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


def calibration(sequences: int = 4) -> CalibrationSet:
    """The first of every four is padded."""
    ids = torch.randint(3, 300, (sequences, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[::4, :5] = False
    return CalibrationSet(ids.masked_fill(~mask, 0), mask, "by hand", 0, "by hand", False)


def values(model: DecoderModel, kind: str, name: str, sequences: int = 4) -> list[Any]:
    """All numbers that a criterion or a compensation returns."""
    given = calibration(sequences)
    if kind == "compensation":
        found = get_method(name).run(model, given, (2,), FitSettings(batch_size=2))
        return [*flat(found.report), *(value.float() for value in found.replaced.values())]
    recipe = Recipe(criterion=name, batch_size=2, trial_samples=2, minibatch_sequences=2, minibatch_positions=8)
    seen = observe(model, given, recipe, [name], similarity=True)
    assert seen.similarity is not None
    criterion = seen.criteria[name]
    if isinstance(criterion, ScoreCriterion):
        return [*criterion.scores(), seen.similarity.values.float()]
    assert isinstance(criterion, SetCriterion)
    return [*criterion.choose(2, range(1, model.num_layers)), seen.similarity.values.float()]


def flat(report: Any) -> Iterator[Any]:
    if isinstance(report, dict):
        for each in report.values():
            yield from flat(each)
    elif isinstance(report, list | tuple):
        for each in report:
            yield from flat(each)
    else:
        yield report


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)
        elif isinstance(one, float):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-7)
        else:
            assert one == other


@dataclass(frozen=True)
class Placed:
    """A model on pretended devices; only inside ``devices.pretended()``."""

    devices: PretendedDevices
    model: DecoderModel
    indices: tuple[int, ...] = (0,)


def one_gpu(folder: Path) -> Placed:
    devices = PretendedDevices(1)
    with devices.pretended():
        return Placed(devices, wrap_model(llama().to("cuda")))


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


PLACES: dict[str, Callable[[Path], Placed]] = {
    "one GPU": one_gpu,
    "two GPUs": two_gpus,
    "one GPU, streamed": streamed,
    "rank 1 of 2, streamed": second_rank,
    "MPS": apple,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(llama(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=PLACES)
def placed(request: pytest.FixtureRequest, folder: Path) -> Placed:
    return PLACES[request.param](folder)


@pytest.fixture(scope="module")
def expected() -> Callable[[str, str], list[Any]]:
    """The values on the CPU, computed once."""
    model, known = wrap_model(llama()), dict[tuple[str, str], list[Any]]()

    def of(kind: str, name: str) -> list[Any]:
        if (kind, name) not in known:
            known[kind, name] = values(model, kind, name)
        return known[kind, name]

    return of


@pytest.mark.parametrize(("kind", "name"), STEPS, ids=[name for _, name in STEPS])
def test_values_are_those_of_the_cpu(
    kind: str, name: str, placed: Placed, expected: Callable[[str, str], list[Any]]
) -> None:
    wanted = expected(kind, name)
    with placed.devices.pretended():
        assert_same(values(placed.model, kind, name), wanted)
    assert placed.devices.used == {placed.devices.named(index) for index in placed.indices}
