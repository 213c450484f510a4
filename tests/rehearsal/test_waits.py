"""How often the host waits for a device: a constant number of times a sequence, whatever the depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from placements import calibration, llama, one_gpu, streamed
from pretended_devices import PretendedDevices
from rehearsed_steps import values
from tiny_models import save_tiny

from sglp_llm.analysis.observing import observe
from sglp_llm.criteria import criterion_names, get_criterion
from sglp_llm.engine import Need
from sglp_llm.models import find_source
from sglp_llm.models.loading import DecoderModel, load_model
from sglp_llm.plan import Recipe

ONE_PASS = [name for name in criterion_names() if Need.TRIALS not in get_criterion(name).needs]
WHOLE = [name for name in ONE_PASS if Need.GRADIENTS in get_criterion(name).needs]
"""They take one sequence a step."""

FEW = 3.0
"""A step's loss is looked at before its backward pass, CKA once a minibatch, and copies to a disk or a full device cost none."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A checkpoint with so many layers, written once."""

    @cache
    def saved(layers: int) -> Path:
        return save_tiny(llama(layers), tmp_path_factory.mktemp("model"))

    return saved


def waits_a_sequence(
    devices: PretendedDevices, model: DecoderModel, names: list[str], padded: bool = False
) -> tuple[float, Counter]:
    """Of all criteria together, from what two more sequences cost."""
    recipe = Recipe(criterion=names[0], batch_size=2, minibatch_sequences=2, minibatch_positions=8)
    counts = []
    with devices.pretended():
        for sequences in (4, 8) if padded else (2, 4):
            devices.waits.clear()
            observe(model, calibration(sequences, padded), recipe, names, similarity=True)
            counts.append(Counter(devices.waits))
    more = counts[1] - counts[0]
    return sum(more.values()) / (sequences // 2), more


@pytest.mark.parametrize("names", [[name for name in ONE_PASS if name not in WHOLE], WHOLE], ids=["norms", "whole"])
@pytest.mark.parametrize("engine", ["resident", "streamed", "streamed, no room on the device"])
def test_a_sequence_costs_few_waits_at_any_depth(
    names: list[str], engine: str, folder_of: Callable[[int], Path]
) -> None:
    found = []
    for layers in (2, 3):
        placed = one_gpu(folder_of(layers), layers) if engine == "resident" else streamed(folder_of(layers))
        placed.devices.free = 0 if "no room" in engine else placed.devices.free
        found.append(waits_a_sequence(placed.devices, placed.model, names))
    assert found[0][0] == found[1][0] <= FEW, found


@pytest.mark.parametrize("engine", ["resident", "streamed"])
@pytest.mark.parametrize(("kind", "name"), [("criterion", "ppl"), ("compensation", "linear")])
def test_trials_and_repairs_wait_no_more_often_for_more_layers(
    kind: str, name: str, engine: str, folder_of: Callable[[int], Path]
) -> None:
    """But for one look at the numbers of each streamed layer; a padded step more costs a look at its mask."""
    found = []
    for layers in (3, 4):
        for sequences in (4, 6):
            placed = one_gpu(folder_of(layers), layers) if engine == "resident" else streamed(folder_of(layers))
            placed.devices.waits.clear()
            with placed.devices.pretended():
                values(placed.model, kind, name, sequences)
            looks = sum(count for (line, _), count in placed.devices.waits.items() if line.startswith("models/finite"))
            assert looks == (layers if engine == "streamed" else 0)
            found.append(sum(placed.devices.waits.values()) - looks)
    assert found[:2] == found[2:], found
    assert found[1] - found[0] <= 2


def test_masks_of_padded_sequences_are_made_once(folder_of: Callable[[int], Path]) -> None:
    found = []
    for layers in (2, 3):
        placed = streamed(folder_of(layers))
        found.append(waits_a_sequence(placed.devices, placed.model, ["gradnorm", "bi"], padded=True))
    assert found[0][0] == found[1][0] <= FEW, found


def test_a_model_is_loaded_to_the_device_of_its_process(tmp_path: Path) -> None:
    """And nothing of it to the first one."""
    save_tiny(llama(), tmp_path)
    devices = PretendedDevices(2, current=1)
    with devices.pretended():
        model = load_model(find_source(tmp_path))
        assert {str(parameter.device) for parameter in model.model.parameters()} == {"cuda:1"}
