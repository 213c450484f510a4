"""What follows the last layer, as modules. Oracle: plain transformers, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import Tiny, every_tiny, tiny_model, token_ids

from sglp_llm.engine.replay import Replay
from sglp_llm.models.loading import wrap_model

CAPPED = ("gemma2",)
"""Families whose own code changes the logits."""


def calls_of(model: Any) -> list[int]:
    """How many tokens each call of the whole model had."""
    seen = list[int]()
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    return seen


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_logits_are_those_of_the_whole_model_by_its_last_modules(tiny: Tiny) -> None:
    model, ids = tiny_model(tiny).eval(), token_ids()
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits
        replay = Replay(wrap_model(model), ids, None)
        states = replay.layers(0, frozenset(), replay.first_states)
        seen = calls_of(model)
        pieces = [replay.logits(states[:, first : first + 8], slice(first, first + 8)) for first in range(0, 40, 8)]
    whole = torch.cat(pieces, dim=1)
    torch.testing.assert_close(whole, expected[:, : whole.shape[1]], rtol=0, atol=1e-6)  # other shapes, other sums
    with torch.inference_mode():
        assert torch.equal(replay.logits(states), expected)
    once = [2]  # to see what comes after the layers
    assert seen == (
        once + [piece.shape[0] * piece.shape[1] for piece in pieces] + [ids.numel()] if tiny.family in CAPPED else once
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_logits_that_a_models_own_code_changes_are_not_taken_from_its_modules(
    in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(Tiny("llama", 0)).eval(), token_ids()
    forward = type(model).forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(self, *args, **kwargs)
        found.logits = found.logits.mul_(3) if in_place else found.logits * 3
        return found

    monkeypatch.setattr(type(model), "forward", scaled)
    with torch.inference_mode():
        replay = Replay(wrap_model(model), ids, None)
        found = replay.logits(replay.layers(0, frozenset(), replay.first_states))
        assert torch.equal(found, model(input_ids=ids, use_cache=False).logits)


def test_one_token_is_enough_and_gradients_flow() -> None:
    model, ids = tiny_model(Tiny("llama", 0)).eval(), token_ids()[:1, :1]
    replay = Replay(wrap_model(model), ids, None)
    states = replay.first_states.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(replay.logits(states).sum(), states)
    other = states.detach().requires_grad_(True)
    (expected,) = torch.autograd.grad(model.lm_head(model.model.norm(other)).sum(), other)
    assert torch.equal(gradient, expected)
