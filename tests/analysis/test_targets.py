"""The fewest layers that fit into a memory: transformers counts the exported model, and one layer more does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import QUICK, SMALL, run_cli
from model_bytes import total_bytes
from tiny_models import Tiny, load_plain, save_tiny, tiny_model

from sglp_llm import UserError, analyze, load_plan, replan
from sglp_llm.analysis.targets import LONGEST_DEFAULT, context_of
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import Recipe
from sglp_llm.records import Footprint

GEMMA = Tiny("gemma3_text", 0)  # has layers with and without a sliding window
TEXT = dict(zip(("calibration", "samples", "seq_len"), (SMALL[1], 4, 16), strict=True))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_model(GEMMA), tmp_path_factory.mktemp("source") / "gemma")


@pytest.mark.parametrize("share", [0.6, 0.8, 0.95])
def test_the_fewest_layers_that_fit(share: float, source: Path, tmp_path: Path) -> None:
    context = 40
    target = int(share * total_bytes(load_plain(source), context))
    options = (*SMALL, "--criterion", "bi", "--no-verify")
    wanted = ("--target-memory", f"{target}B", "--context", context)
    assert run_cli("prune", source, *options, *wanted, "-o", tmp_path / "out").code == 0
    assert total_bytes(load_plain(tmp_path / "out"), context) <= target

    fewer = len(load_plan(tmp_path / "out").removed) - 1
    shorter = source
    if fewer:
        shorter = tmp_path / "fewer"
        assert run_cli("prune", source, *options, "--drop", fewer, "-o", shorter).code == 0
    assert total_bytes(load_plain(shorter), context) > target


def test_replan_fits_without_the_model(source: Path) -> None:
    base = analyze(source, preset="paper", drop=1, **TEXT).plan
    target = f"{int(0.7 * total_bytes(load_plain(source), 16))}B"
    found = replan(base, target_memory=target, context=16)
    assert found == analyze(source, preset="paper", target_memory=target, context=16, **TEXT).plan
    assert found.budget == {"target_memory": target}
    assert replan(found, drop=1) == base  # the context goes with the budget it belongs to


def test_the_default_context_is_the_longest_of_the_model_within_a_limit() -> None:
    def footprint(positions: int | None) -> Footprint:
        return Footprint(2, 10, (1, 1), (3, 3), (None, 7), positions)

    assert [context_of(None, footprint(positions)) for positions in (512, 10**6, None)] == [512, 4096, 4096]
    assert LONGEST_DEFAULT == 4096
    assert context_of(5, footprint(512)) == 5
    assert footprint(None).bytes_without((0,), 4096) == 2 * (10 + 1 + 3 * 7)


def test_it_is_printed(source: Path) -> None:
    footprint = OpenedModel(source).footprint()
    target = footprint.bytes_without((0, 1), 64)
    out = run_cli("analyze", source, *SMALL, "--criterion", "reverse", "--target-memory", f"{target}B").out
    assert "Memory            " in out
    assert out.splitlines()[-2].endswith("weights and a KV cache of 128 tokens")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_memory": "1GB"},
            "target_memory 1GB removes no layer: with all layers kept, weights and a KV cache of 128",
        ),
        (
            {"target_memory": "1KB", "context": 9},
            "target_memory 1KB cannot be reached: with the 7 layers that can go removed",
        ),
        ({"target_memory": "6 gigs"}, "'6 gigs' is not a size such as 500MB, 2GB or 1.5GiB"),
        ({"target_memory": "1KB", "context": 129}, "context 129 is longer than the 128 positions"),
        ({"target_memory": "1KB", "context": 0}, "context must be at least 1, not 0"),
        ({"drop": 1, "context": 5}, "context is for the KV cache that target_memory counts"),
        (
            {"target_memory": "1KB", "drop": 1},
            "exactly one of ratio, drop, target_params, target_memory and target_latency, not drop and",
        ),
        ({"target_params": 10**9}, "target_params 1,000,000,000 removes no layer: with all layers kept, "),
    ],
)
def test_refused_before_layers_are_scored(settings: dict[str, Any], message: str, source: Path) -> None:
    def never(*_: object) -> Any:
        raise AssertionError("a pass was begun")

    with pytest.raises(UserError, match=message):
        analyze(source, recipe=Recipe(criterion="bi", **TEXT), progress=never, **settings)
    plan = analyze(source, recipe=Recipe(criterion="bi", drop=2, **TEXT)).plan
    with pytest.raises(UserError, match=message):
        replan(plan, **settings)


def test_the_least_is_a_target_that_can_be_reached(source: Path) -> None:
    with pytest.raises(UserError, match=r"take [\d.]+ KB \([\d,]+ bytes\)") as raised:
        analyze(source, criterion="bi", target_memory="1KB", **TEXT)
    least = str(raised.value).split("(")[-1].split(" ")[0].replace(",", "")
    assert len(analyze(source, criterion="bi", target_memory=f"{least}B", **TEXT).plan.removed) == GEMMA.depth - 1
    outcome = run_cli("analyze", source, *QUICK, "--target-memory", f"{int(least) - 1}B")
    assert "cannot be reached" in outcome.err
