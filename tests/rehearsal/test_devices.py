"""Every criterion and every compensation on pretended devices: nothing mixes devices, and the values are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from placements import Placed, apple, llama, one_gpu, second_rank, streamed, two_gpus
from rehearsed_steps import STEPS, assert_same, values
from tiny_models import save_tiny

from sglp_llm.models.loading import wrap_model

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
