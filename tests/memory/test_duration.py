"""The predicted time. Oracle: torch's own count of operations while plain transformers runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import run_cli
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from sglp_llm.memory.duration import ACCELERATORS, EFFICIENCY, Duration, predict_durations
from sglp_llm.memory.prediction import work_of
from sglp_llm.plan import Recipe

H100 = ACCELERATORS["h100"]
SMALL = Recipe(criterion="gradnorm", samples=4, seq_len=64, ratio=0.25)


def llama(layers: int = 4) -> AutoConfig:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 512}
    return AutoConfig.for_model("llama", num_hidden_layers=layers, **shape)


def both(recipe: Recipe, layers: int = 4) -> tuple[Duration, Duration]:
    return predict_durations(llama(layers), torch.float32, recipe, work_of(recipe), H100)


def products(duration: Duration) -> float:
    return duration.terms["products"] * EFFICIENCY * H100.single


@pytest.mark.parametrize(("criterion", "trained"), [("bi", None), ("gate", False), ("taylor", True)])
def test_products_are_those_that_torch_counts(criterion: str, trained: bool | None) -> None:
    """Forward alone, with the gradients of what goes in, and with those of the layers' weights."""
    model = AutoModelForCausalLM.from_config(llama())
    model.requires_grad_(False)
    model.model.layers.requires_grad_(bool(trained))
    ids = torch.randint(0, 512, (4, 64))
    with FlopCounterMode(display=False) as counter:
        states = model.get_input_embeddings()(ids).requires_grad_(True)
        if trained is None:
            model.model(inputs_embeds=states, use_cache=False)
        else:
            model(inputs_embeds=states, labels=ids, use_cache=False).loss.backward()
    found = products(both(replace(SMALL, criterion=criterion))[0])
    assert found == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_norms_cost_no_more_than_gradients_and_streaming_one_more_forward_pass() -> None:
    (norms, again), (whole, _) = both(SMALL), both(replace(SMALL, criterion="taylor"))
    (states, _) = both(replace(SMALL, criterion="gate"))
    assert products(states) < products(norms) < products(whole)
    forward = products(both(replace(SMALL, criterion="bi"))[0])
    assert products(again) - products(norms) == pytest.approx(forward)


def test_more_work_takes_longer_and_a_slow_disk_dominates() -> None:
    for changes in ({"also": ("kl",)}, {"compensate": "linear"}, {"compensate": "learned"}, {"samples": 8}):
        for more, less in zip(both(SMALL.with_changes(**changes)), both(SMALL), strict=True):
            assert products(more) > products(less), changes
            assert more.seconds >= less.seconds, changes
    slow = predict_durations(llama(), torch.float32, SMALL, work_of(SMALL), H100, 1e3)
    assert [each.dominating for each in slow] == ["disk", "disk"]


def test_the_command_says_what_most_of_the_time_goes_to(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    outcome = run_cli("plan-memory", str(tmp_path), "--criterion", "gradnorm", "--on", "h100", "--json")
    times = json.loads(outcome.out)["times"]
    assert set(times["resident"]["terms"]) == {"products", "float64", "bus", "disk"}
    assert all(times[engine]["seconds"] > 0 for engine in ("resident", "streamed"))
    wrong = run_cli("plan-memory", str(tmp_path), "--on", "h10")
    assert wrong.code == 2
    assert "h100" in wrong.err
