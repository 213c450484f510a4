"""The next-token loss against transformers' own and against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from sglp_llm.engine.loss import sequence_loss, token_nll


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


def random_case(batch: int = 3, tokens: int = 7, vocabulary: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(batch, tokens, vocabulary, generator=generator)
    return logits, torch.randint(vocabulary, (batch, tokens), generator=generator)


def test_every_entry_is_the_cross_entropy_of_the_next_token() -> None:
    logits, ids = random_case()
    losses = token_nll(logits, ids)
    assert losses.shape == (3, 6)
    for row in range(3):
        for position in range(6):
            expected = -math.log(torch.softmax(logits[row, position].double(), 0)[ids[row, position + 1]])
            assert losses[row, position].item() == pytest.approx(expected, rel=1e-5)


def test_sequence_loss_is_transformers_own_loss_of_each_sequence() -> None:
    model = tiny_model()
    ids = torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(2))
    ours = sequence_loss(model(ids).logits, ids)
    theirs = torch.stack([model(row[None], labels=row[None]).loss for row in ids])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str) -> None:
    model = tiny_model()
    ids = torch.randint(1, 50, (1, 6), generator=torch.Generator().manual_seed(3))
    padding = torch.zeros(1, 4, dtype=torch.int64)
    padded = torch.cat([padding, ids] if side == "left" else [ids, padding], dim=1)
    mask = padded != 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask.long(), position_ids=positions).logits
    expected = model(ids, labels=ids).loss
    torch.testing.assert_close(sequence_loss(logits, padded, mask)[0], expected)
    torch.testing.assert_close(sequence_loss(logits, padded, mask.long())[0], expected)
    assert int((token_nll(logits, padded, mask) != 0).sum()) == 5


def test_masked_predictions_are_exactly_zero() -> None:
    logits, ids = random_case(batch=1, tokens=6)
    mask = torch.tensor([[True, True, False, True, True, False]])
    assert (token_nll(logits, ids, mask) != 0).tolist() == [[True, False, False, True, False]]


def test_bfloat16_logits_are_scored_in_float32() -> None:
    logits, ids = random_case()
    low = (logits * 20).bfloat16()
    losses = token_nll(low, ids)
    assert losses.dtype == torch.float32
    assert sequence_loss(low, ids).dtype == torch.float32
    torch.testing.assert_close(losses, token_nll(low.float(), ids), rtol=0, atol=0)


def test_gradients_are_those_of_the_mean_cross_entropy() -> None:
    logits, ids = random_case(batch=1)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    sequence_loss(ours, ids).sum().backward()
    cross_entropy(theirs[0, :-1], ids[0, 1:]).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_masked_positions_get_no_gradient() -> None:
    logits, ids = random_case(batch=1, tokens=5)
    logits.requires_grad_()
    sequence_loss(logits, ids, torch.tensor([[1, 1, 1, 0, 0]])).sum().backward()
    assert (logits.grad.abs().sum(dim=-1) != 0).tolist() == [[True, True, False, False, False]]


def test_nothing_to_predict_costs_nothing() -> None:
    logits, ids = random_case(batch=2, tokens=4)
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    assert sequence_loss(logits, ids, nothing).tolist() == [0.0, 0.0]
    assert sequence_loss(logits[:, :1], ids[:, :1]).tolist() == [0.0, 0.0]
