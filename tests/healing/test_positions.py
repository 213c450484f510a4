"""Losses at some positions only, and a teacher that is asked again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import TEXT
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Tiny, every_tiny, save_tiny, tiny_model

from sglp_llm import heal, prune
from sglp_llm.healing.loss import IGNORED, divergence, next_token_loss, sampled_positions, top_k_of
from sglp_llm.healing.teacher import OnlineTeacher, logits_at
from sglp_llm.models.loading import wrap_model

GENERATOR = torch.Generator().manual_seed(7)
IDS = torch.randint(3, 300, (4, 13), generator=GENERATOR)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [None, 6])
def test_the_mean_over_a_partition_of_the_positions_is_the_whole_loss(beta: float, top_k: int | None) -> None:
    own, other = torch.randn(2, 3, 13, 40, generator=GENERATOR)
    labels = torch.randint(40, (3, 13), generator=GENERATOR)
    labels[0, 4:9] = IGNORED
    parts = torch.randperm(12, generator=GENERATOR).split(4)
    teacher = other if top_k is None else top_k_of(other, top_k, 1.5)
    estimates = []
    for part in parts:
        at = other[:, part] if top_k is None else top_k_of(other[:, part], top_k, 1.5)
        estimates.append(divergence(own[:, part], at, labels, 1.5, beta, part))
    torch.testing.assert_close(torch.stack(estimates).mean(), divergence(own, teacher, labels, 1.5, beta))
    alone = torch.stack([next_token_loss(own[:, part], labels, part) for part in parts]).mean()
    torch.testing.assert_close(alone, next_token_loss(own, labels))


@given(tokens=st.integers(2, 40), share=st.floats(0.01, 1), seed=st.integers(0, 2**63 - 1))
def test_a_sample_of_positions(tokens: int, share: float, seed: int) -> None:
    found = sampled_positions(tokens, share, seed)
    count = max(1, round(share * (tokens - 1)))
    if found is None:
        assert count == tokens - 1
        return
    assert found.tolist() == sorted(set(found.tolist()))
    assert len(found) == count
    assert 0 <= int(found[0]) <= int(found[-1]) < tokens - 1


def test_every_position_is_as_likely() -> None:
    counts = torch.zeros(9)
    for seed in range(900):
        counts[sampled_positions(10, 1 / 3, seed)] += 1
    assert counts.sum() == 2700
    assert (counts - 300).abs().max() < 5 * 14  # binomial, 900 draws of chance 1/3: a standard deviation of 14


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_logits_at_some_positions_are_those_of_the_plain_model(tiny: Tiny) -> None:
    model, positions = tiny_model(tiny), torch.tensor([1, 2, 7, 11])
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        torch.testing.assert_close(logits_at(model, IDS, positions), expected[:, positions], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits_at(model, IDS, None), expected)


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_a_sequence_that_is_asked_for_again_goes_through_the_layers_once(tiny: Tiny) -> None:
    model = wrap_model(tiny_model(tiny))
    plain, teacher = OnlineTeacher(model), OnlineTeacher(model)
    teacher.remember([1, 2, 3])
    calls: list[int] = []
    handle = next(model.layers[0].children()).register_forward_hook(lambda *_: calls.append(1))
    for numbers, passes in (([1, 3], 1), ([2], 2), ([3, 2], 2), ([1, 2], 2)):
        chosen = torch.tensor(numbers)
        found = teacher.targets(chosen, IDS[chosen])
        assert len(calls) == passes
        at = teacher.targets(chosen, IDS[chosen], torch.tensor([0, 5, 6]))
        with torch.no_grad():
            expected = model.model(input_ids=IDS[chosen]).logits
        del calls[passes:]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(at, expected[:, [0, 5, 6]], rtol=1e-5, atol=1e-5)
    handle.remove()
    torch.testing.assert_close(teacher.targets(torch.tensor([0]), IDS[:1]), plain.targets(torch.tensor([0]), IDS[:1]))


def test_a_step_has_the_same_positions_in_all_of_its_batches(tmp_path: Path) -> None:
    source = save_tiny(tiny_model(Tiny("llama", 0)), tmp_path / "source")
    prune(source, tmp_path / "short", criterion="bi", calibration=TEXT, samples=4, seq_len=16, drop=2)
    settings = {"data": TEXT, "tokens": 128, "seq_len": 16, "sequences": 4, "dtype": "float32", "held_out": 0.3}
    losses = {}
    for batch_size, share in ((1, 0.5), (4, 0.5), (4, 1.0)):
        report = heal(
            tmp_path / "short", tmp_path / f"{batch_size} {share}", batch_size=batch_size, positions=share, **settings
        )
        losses[batch_size, share] = [entry["loss"] for entry in report.log if "loss" in entry]
        record = report.record
        assert record.before["loss"] > record.after["loss"]
    assert losses[1, 0.5] == pytest.approx(losses[4, 0.5], rel=1e-4)
    assert losses[4, 1.0] != pytest.approx(losses[4, 0.5], rel=1e-2)
