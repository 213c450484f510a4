"""``bench --draft-for``: acceptance against speculative decoding written out with plain forward passes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import run_cli, save_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from sglp_llm.checkpoint.export import drop_layers
from sglp_llm.evaluation.drafting import DraftSettings, measure_drafting
from sglp_llm.models.opened import OpenedModel

NEW = 12
PROPOSED = 3
SHORT = ("--prompt-len", 8, "--new-tokens", NEW, "--draft-tokens", PROPOSED, "--prompts", 2, "--repeats", 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def short(tiny: Path) -> Path:
    folder = tiny.parent / "short"
    assert run_cli("prune", tiny, "--plan", "3", "-o", folder, "--no-verify").code == 0
    return folder


def greedy(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """The next tokens by whole forward passes, without a cache and without ``generate``."""
    for _ in range(tokens):
        with torch.inference_mode():
            ids = torch.cat([ids, model(ids[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return ids


def passes(large: PreTrainedModel, small: PreTrainedModel, prompt: torch.Tensor) -> tuple[int, int]:
    """How many passes of the original speculative decoding takes, and how many tokens are proposed in them."""
    whole = greedy(large, prompt, NEW)
    at, steps, proposed = len(prompt), 0, 0
    while at < len(whole):
        count = min(PROPOSED, len(whole) - at - 1)
        drafted = greedy(small, whole[:at], count)[at:]
        at += int((drafted == whole[at : at + count]).long().cumprod(0).sum()) + 1
        steps, proposed = steps + 1, proposed + count
    return steps, proposed


def test_acceptance_is_that_of_speculative_decoding_written_out(tiny: Path, short: Path) -> None:
    prompts = torch.arange(24).view(3, 8) * 7 % 300 + 3
    large, small = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny, short))
    for draft, model in ((short, small), (tiny, large)):
        counts = [passes(large, model, prompt) for prompt in prompts]
        steps, proposed = (sum(column) for column in zip(*counts, strict=True))
        settings = DraftSettings(NEW, PROPOSED, warmup=0, repeats=1)
        found = measure_drafting(OpenedModel(tiny), OpenedModel(draft), prompts, settings)
        assert (found.steps, found.equal) == (steps, 3)
        assert found.acceptance_length == 3 * NEW / steps
        assert found.acceptance_rate == pytest.approx((3 * NEW - steps) / proposed)
    assert found.acceptance_length == PROPOSED + 1  # a model that drafts for itself is always right


def test_the_models_are_left_as_they_were_and_end_of_text_does_not_stop(tiny: Path) -> None:
    large = OpenedModel(tiny)
    model = large.load().model
    model.generation_config.eos_token_id = list(range(320))
    model.generation_config.repetition_penalty = 1.3
    before, hooks = model.generation_config.to_dict(), len(model._forward_pre_hooks)
    small = OpenedModel(drop_layers(AutoModelForCausalLM.from_pretrained(tiny), [1]))
    found = measure_drafting(large, small, torch.arange(8)[None] + 3, DraftSettings(NEW, PROPOSED, 0, 1))
    assert found.steps < NEW or found.acceptance_length == 1
    assert found.acceptance_length * found.steps == pytest.approx(NEW)
    assert model.generation_config.to_dict() == before
    assert len(model._forward_pre_hooks) == hooks


def test_command_line(tiny: Path, short: Path) -> None:
    outcome = run_cli("bench", short, "--draft-for", tiny, *SHORT, "--json")
    assert outcome.code == 0, outcome
    found = json.loads(outcome.out)
    assert (found["original"], found["draft"], found["equal"]) == (str(tiny), str(short), 2)
    assert found["settings"] == {"new_tokens": NEW, "draft_tokens": PROPOSED, "warmup": 1, "repeats": 1}
    plain, drafted = (found[f"{kind}_tokens_per_second"]["values"][0] for kind in ("plain", "draft"))
    assert found["speed_up"]["median"] == pytest.approx(drafted / plain)
    text = run_cli("bench", short, "--draft-for", tiny, *SHORT).out
    assert f"Acceptance   {found['acceptance_length']:.2f} tokens a pass of the original, of at most 4" in text
    assert "equal to plain greedy generation after 2 of 2 prompts" in text


def test_refused(tiny: Path, short: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", vocab_size=310)
    assert (
        "has a vocabulary of 310 tokens, and the original one of 320"
        in run_cli("bench", other, "--draft-for", tiny, *SHORT).error
    )
    assert "give one of them" in run_cli("bench", short, "--draft-for", tiny, "--baseline", tiny).error
    assert "give --draft-for ORIGINAL too" in run_cli("bench", short, "--prompts", 3).error
    assert "more than the model's 128 positions" in run_cli("bench", short, "--draft-for", tiny).error
    assert (
        "draft_tokens must be at least 1"
        in run_cli("bench", short, "--draft-for", tiny, "--prompt-len", 8, "--draft-tokens", 0).error
    )
