"""Perplexity against transformers' own loss, window by window."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sglp_llm.calibration import EvaluationWindows
from sglp_llm.errors import UserError
from sglp_llm.evaluation.perplexity import perplexity
from sglp_llm.progress import Advance


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def windows(count: int = 5, length: int = 12) -> EvaluationWindows:
    ids = torch.randint(50, (count, length), generator=torch.Generator().manual_seed(4))
    return EvaluationWindows(ids, "pydoc:test", bos=False)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_it_is_what_transformers_own_losses_give(build: type) -> None:
    model, data = build(), windows()
    with torch.no_grad():
        losses = [float(model(row[None], labels=row[None]).loss) for row in data.input_ids]
    result = perplexity(model, data)
    mean, error = statistics.fmean(losses), statistics.stdev(losses) / math.sqrt(5)
    assert result.mean_nll == pytest.approx(mean, rel=1e-6)
    assert result.nll_standard_error == pytest.approx(error, rel=1e-4)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
    assert result.perplexity_standard_error == pytest.approx(math.exp(mean) * error, rel=1e-4)
    assert (result.dataset, result.window, result.windows, result.bos, result.tokens) == (
        "pydoc:test",
        12,
        5,
        False,
        55,
    )


@pytest.mark.parametrize("batch_size", [2, 5, 100])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    model, data = llama(), windows()
    one, many = perplexity(model, data), perplexity(model, data, batch_size=batch_size)
    assert many.mean_nll == pytest.approx(one.mean_nll, rel=1e-6)
    assert many.nll_standard_error == pytest.approx(one.nll_standard_error, rel=1e-4)


def test_a_bfloat16_model_is_scored_in_float32() -> None:
    model, data = llama().bfloat16(), windows(count=2)
    with torch.no_grad():
        logits = model(data.input_ids).logits.double()
    chosen = logits[:, :-1].log_softmax(-1).gather(2, data.input_ids[:, 1:, None])
    assert perplexity(model, data, batch_size=2).mean_nll == pytest.approx(-float(chosen.mean()), rel=1e-5)


def test_one_window_has_no_standard_error_and_stays_valid_json() -> None:
    result = perplexity(llama(), windows(count=1))
    assert (result.nll_standard_error, result.perplexity_standard_error) == (0.0, 0.0)
    json.dumps(asdict(result), allow_nan=False)


def test_every_module_is_left_in_the_mode_it_was_in() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    perplexity(model, windows(count=1))
    assert [module.training for module in model.modules()] == before


def test_dropout_is_off_while_measuring() -> None:
    model, data = gpt2(), windows()
    assert perplexity(model.train(), data).mean_nll == perplexity(model.eval(), data).mean_nll


def test_the_mode_is_restored_after_a_failure() -> None:
    model = llama().train()
    with pytest.raises(IndexError):
        perplexity(model, EvaluationWindows(torch.full((1, 4), 50), "broken", bos=False))
    assert model.training


def test_progress_hears_of_every_window() -> None:
    heard: list[object] = []

    @contextmanager
    def listen(description: str, total: int) -> Iterator[Advance]:
        heard.append(total)
        yield heard.append

    perplexity(llama(), windows(), batch_size=2, progress=listen)
    assert heard == [5, 2, 2, 1]


def test_a_loss_that_is_not_finite_names_its_window() -> None:
    model, data = llama(), windows()
    data.input_ids.clamp_(max=48)
    data.input_ids[3, 5] = 49
    with torch.no_grad():
        model.model.embed_tokens.weight[49] = math.nan
    with pytest.raises(UserError, match=r"pydoc:test: the loss of window 3 \(of 5, counted from 0\) is nan"):
        perplexity(model, data, batch_size=2)


def test_a_loss_beyond_any_perplexity_is_refused() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    with pytest.raises(UserError, match=r"the mean loss is .* nats a token"):
        perplexity(model, windows())


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_window_beyond_the_context_is_refused(build: type) -> None:
    assert perplexity(build(), windows(count=1, length=32)).tokens == 31
    with pytest.raises(UserError, match="a window of 33 tokens is longer than the model's context of 32"):
        perplexity(build(), windows(count=1, length=33))


def test_a_batch_needs_a_window() -> None:
    with pytest.raises(UserError, match="batch_size is 0"):
        perplexity(llama(), windows(), batch_size=0)
