"""Predicted peaks: counts against plain transformers, the dry run against autograd, the whole against a measured process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import QUICK, save_tiny
from helpers import ROOT, TEXT
from tiny_models import Tiny, every_tiny, tiny_model, token_ids
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from sglp_llm.engine import Need
from sglp_llm.memory import EngineMemory, FreeMemory
from sglp_llm.memory.dry_run import DryRun, dry_run
from sglp_llm.memory.parameter_counts import count_parameters
from sglp_llm.memory.peaks import RUNTIME, Work, fits, plan_memory
from sglp_llm.memory.prediction import work_of
from sglp_llm.plan import Recipe

GRADIENTS = Work(Need.GRADIENT_NORMS, samples=4, seq_len=64, trial_samples=4, batch_size=4)


def llama(**changes: Any) -> Any:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    return AutoConfig.for_model("llama", **{**shape, "vocab_size": 256, **changes})


# Counts


@pytest.mark.parametrize("tiny_config", every_tiny(), ids=str)
def test_parameters_are_those_of_plain_transformers(tiny_config: Tiny) -> None:
    model = tiny_model(tiny_config)
    layers = model.get_submodule(tiny_config.adapter.layers)
    dry = DryRun(model.config, torch.float32)
    counts = count_parameters(dry.model, dry.layers)
    in_layers = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
    assert counts.total == model.num_parameters()
    assert counts.layer == max(in_layers)
    assert counts.outside == model.num_parameters() - sum(in_layers)
    embedding = model.get_input_embeddings().weight
    assert counts.embedding == (0 if model.config.tie_word_embeddings else embedding.numel())
    assert counts.matrices == sum(weight.numel() for weight in layers.parameters() if weight.ndim > 1)


def test_a_tied_embedding_counts_once() -> None:
    tied, untied = (
        plan_memory(llama(tie_word_embeddings=tie), torch.float32, GRADIENTS, False) for tie in (True, False)
    )
    assert untied.resident.host["weights"] - tied.resident.host["weights"] == 4 * 256 * 64
    assert untied.streamed.host["weights"] == tied.streamed.host["weights"]  # the head is there either way


@pytest.mark.parametrize(
    "tiny_config", [tiny for tiny in every_tiny() if tiny.adapter.active_experts_key is None], ids=str
)
def test_layers_keep_what_autograd_saves(tiny_config: Tiny) -> None:
    """All layers but the first: the difference of what autograd saves with all of them and with one, parameters apart."""
    model = tiny_model(tiny_config)
    model.requires_grad_(False)
    layers = model.get_submodule(tiny_config.adapter.layers)
    layers.requires_grad_(True)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage  # held, so that no address is given twice
        return tensor

    totals, removed = [], list[Any]()  # removed layers stay: their addresses must not become those of activations
    for _ in range(2):
        saved.clear()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            states = model.base_model(input_ids=token_ids()[:1], use_cache=False).last_hidden_state
        totals.append(sum(storage.nbytes() for address, storage in saved.items() if address not in own))
        removed.extend(layers[1:])
        del states, layers[1:]
    dry = DryRun(model.config, torch.float32)
    kept = dry.kept_for_backward(tiny_config.depth, 40) - dry.kept_for_backward(1, 40)
    assert kept == pytest.approx(totals[0] - totals[1], rel=0.03)


def test_the_dry_run_takes_no_memory() -> None:
    dry = DryRun(llama(hidden_size=65536, intermediate_size=262144), torch.bfloat16)  # 600 GB
    assert count_parameters(dry.model, dry.layers).layer > 6e10
    assert dry.forward_peak(1, 8, 4096) > 2 * 8 * 4096 * 262144


def test_a_mixture_in_float32_takes_twice_what_it_takes_in_bfloat16() -> None:
    config = tiny_model(next(tiny for tiny in every_tiny() if tiny.adapter.active_experts_key)).config
    wide, narrow = (DryRun(config, dtype).kept_for_backward(2, 40) for dtype in (torch.float32, torch.bfloat16))
    assert wide == 2 * narrow


def test_equal_configurations_share_a_dry_run() -> None:
    named = llama()
    named.name_or_path = "/another/folder"
    shared = dry_run(llama(), torch.float32)
    assert dry_run(named, torch.float32) is shared
    changed = (
        (llama(hidden_size=128), torch.float32),
        (llama(num_hidden_layers=5), torch.float32),
        (llama(), torch.half),
    )
    assert all(dry_run(config, dtype) is not shared for config, dtype in changed)
    for sizes in ((1, 16), (4, 16), (1, 24), (1, 16)):
        fresh = DryRun(llama(), torch.float32)
        assert shared.training_peak(*sizes) == fresh.training_peak(*sizes)
        assert shared.kept_for_backward(*sizes) == fresh.kept_for_backward(*sizes)


# What grows with what


def test_resident_grows_with_layers_and_tokens_not_with_samples() -> None:
    def parts(layers: int = 4, **changes: Any) -> EngineMemory:
        return plan_memory(
            llama(num_hidden_layers=layers), torch.float32, replace(GRADIENTS, **changes), False
        ).resident

    activations = [parts(layers).host["activations"] for layers in (4, 5, 6)]
    assert activations[2] - activations[1] == pytest.approx(activations[1] - activations[0], abs=1)
    assert parts(seq_len=128).host["activations"] == pytest.approx(2 * parts().host["activations"], rel=0.1)
    assert parts(samples=64) == parts()


def test_streamed_holds_two_layers_and_stores_hidden_states() -> None:
    def streamed(layers: int = 4, **changes: Any) -> EngineMemory:
        return plan_memory(
            llama(num_hidden_layers=layers), torch.float32, replace(GRADIENTS, **changes), False
        ).streamed

    memory = streamed()
    layer = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert memory.host["weights"] == 4 * (2 * layer + 64 + 256 * 64)
    assert memory.host["hidden states"] == (4 + 2) * 4 * 64 * 64 * 4
    assert streamed(layers=8).host["weights"] == memory.host["weights"]
    assert streamed(samples=8).host["hidden states"] == 2 * memory.host["hidden states"]
    on_disk = streamed(scratch=True)
    assert on_disk.disk == memory.host["hidden states"]
    assert on_disk.host_peak == memory.host_peak - on_disk.disk


def test_a_step_takes_as_many_sequences_as_fit() -> None:
    """Halved until the activations fit; whole gradients and experts take one sequence a step."""
    whole = plan_memory(llama(), torch.float32, GRADIENTS, True, FreeMemory(None, 10**12)).resident
    assert whole.step == 4
    assert whole.device_peak is not None
    half = plan_memory(llama(), torch.float32, GRADIENTS, True, FreeMemory(None, whole.device_peak)).resident
    assert half.step == 2
    assert half.device_peak is not None
    assert half.device_peak < whole.device_peak
    assert plan_memory(llama(), torch.float32, replace(GRADIENTS, needs=Need.GRADIENTS), True).resident.step == 1
    assert plan_memory(llama(), torch.float32, replace(GRADIENTS, seq_len=512), False).resident.step == 1


def test_only_layers_behind_the_first_possible_cut_are_refined_and_no_more_than_fit() -> None:
    refined = Work(Need.NOTHING, samples=8, seq_len=64, trial_samples=8, compensation=7, refined_sequences=4)
    every = plan_memory(llama(), torch.float32, refined, True).resident.device
    behind = plan_memory(llama(), torch.float32, replace(refined, protected=2, removed=1), True).resident.device
    assert every is not None
    assert behind is not None
    assert behind["refined weights"] * 4 == every["refined weights"] * 2
    little = plan_memory(llama(), torch.float32, refined, True, FreeMemory(None, 10**6)).resident.device
    assert little is not None
    assert little["refined weights"] * 4 == every["refined weights"]


def test_sums_of_gradients_are_those_of_all_layers_or_of_one() -> None:
    plan = plan_memory(llama(), torch.bfloat16, replace(GRADIENTS, needs=Need.GRADIENTS), False)
    norms = plan_memory(llama(), torch.bfloat16, GRADIENTS, False)
    matrices = 4 * 64 * 64 + 3 * 64 * 96
    assert plan.resident.host["gradients"] - norms.resident.host["gradients"] == 4 * 4 * matrices
    assert plan.streamed.host["gradients"] == 4 * matrices + 2 * 64 * 96
    assert norms.streamed.host["gradients"] == 0


def test_a_device_holds_what_computes_and_the_host_what_is_stored() -> None:
    work = replace(GRADIENTS, needs=Need.GRADIENTS)
    here = plan_memory(llama(), torch.float32, work, False)
    there = plan_memory(llama(), torch.float32, work, True)
    for cpu, gpu in ((here.resident, there.resident), (here.streamed, there.streamed)):
        stored = cpu.host.get("hidden states", 0)
        embedding = 4 * 256 * 64 if gpu.engine == "streamed" else 0  # on the host its rows are read from the file
        assert gpu.device_peak == cpu.host_peak - RUNTIME + embedding
        assert gpu.host.get("hidden states", 0) == gpu.state_bytes == stored
    assert there.resident.host["weights"] < there.resident.device["weights"]  # type: ignore[index,operator]
    at_once = plan_memory(llama(), torch.float32, replace(work, whole_on_host=True), True).resident
    assert at_once.host["weights"] == there.resident.device["weights"]  # type: ignore[index]
    moved = plan_memory(llama(), torch.float32, replace(work, sums_on_host=True), True).resident
    sums = 4 * 4 * (4 * 64 * 64 + 3 * 64 * 96)
    assert moved.host["gradients"] == sums
    assert moved.device_peak == (there.resident.device_peak or 0) - sums


def test_hidden_states_stay_on_a_device_while_they_leave_room() -> None:
    """At most a quarter of what is free beside the weights, and never what would make a run not fit."""
    work = replace(GRADIENTS, samples=64)
    need = plan_memory(llama(), torch.float32, work, True).streamed
    assert need.device is not None
    assert need.device_peak is not None
    stored, weights = need.state_bytes, need.device["weights"]
    least = need.device_peak - stored
    for free in (int(1.2 * least), need.device_peak, 10**9):
        there = FreeMemory(None, free)
        found = plan_memory(llama(), torch.float32, work, True, there).streamed
        quarter, left = (free - weights) // 4, int(0.9 * free) - least
        if found.step == need.step:
            assert found.state_bytes == max(0, min(stored, quarter, left))
            assert fits(found, there) == (left >= 0)
        assert found.host["hidden states"] == stored
    assert found.state_bytes == stored
    assert plan_memory(llama(), torch.float32, replace(work, scratch=True), True).streamed.state_bytes == 0


def test_trials_store_one_set_of_states_a_layer() -> None:
    work = Work(Need.TRIALS, samples=8, seq_len=64, trial_samples=2)
    plan = plan_memory(llama(), torch.float32, work, False)
    assert plan.streamed.host["hidden states"] == (4 + 2) * 2 * 64 * 64 * 4
    assert plan.resident.host["hidden states"] == (4 + 2) * 64 * 64 * 4


@pytest.mark.slow
def test_the_peak_of_a_process_is_near_the_prediction(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, vocab_size=8000
    )
    source = save_tiny(tmp_path / "source")  # for its tokenizer
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    command = [
        sys.executable,
        "-m",
        "sglp_llm",
        "analyze",
        str(source),
        *QUICK[:2],
        "--samples",
        "1",
        "--calibration",
        TEXT,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, "--seq-len", "512", "--json"], env=environment, capture_output=True, text=True, check=True
    )
    memory = json.loads(ended.stdout)["memory"]
    assert 0.9 < memory["predicted_host_bytes"] / memory["peak_host_bytes"] < 1.3


def test_refining_counts_adam_and_the_activations_of_a_step() -> None:
    closed = replace(Work(Need.NOTHING, samples=8, seq_len=64, trial_samples=8), compensation=7)
    refined = replace(closed, refined_sequences=work_of(Recipe(compensate="learned")).refined_sequences)
    assert refined.refined_sequences == 4
    moved = 4 * (64 * 64 + 64 * 96 + 2 * 64)  # output projections and the scales of two norms, in four layers
    for engine, layers in (("resident", 4), ("streamed", 1)):
        plan = getattr(plan_memory(llama(), torch.float32, refined, False), engine)
        assert plan.host["refined weights"] == 5 * 4 * moved
        one = DryRun(llama(), torch.float32).kept_for_backward(layers, 64)
        between = 4 * 4 * 64 * 64 * 4 if engine == "streamed" else 0
        assert plan.host["activations"] == round(1.2 * (4 * one + between))
        assert plan.host_peak > getattr(plan_memory(llama(), torch.float32, closed, False), engine).host_peak


@pytest.mark.parametrize("on_device", [False, True])
def test_compensation_is_a_phase_of_its_own(on_device: bool) -> None:
    nothing = Work(Need.NOTHING, samples=8, seq_len=64, trial_samples=8)
    without = plan_memory(llama(), torch.float32, nothing, on_device)
    scale, linear = (
        plan_memory(llama(), torch.float32, replace(nothing, compensation=count), on_device) for count in (0, 7)
    )
    for engine in ("resident", "streamed"):
        plain, small, large = (getattr(plan, engine) for plan in (without, scale, linear))
        place = "device" if on_device else "host"
        assert getattr(large, place)["equations"] == 7 * 8 * 64 * 64
        assert getattr(large, f"{place}_peak") - getattr(small, f"{place}_peak") == 7 * 8 * 64 * 64
        assert getattr(small, f"{place}_peak") > getattr(plain, f"{place}_peak")
    assert linear.streamed.host["hidden states"] == 5 * 8 * 64 * 64 * 4
    assert work_of(Recipe(compensate="scale")).compensation == 0
    assert work_of(Recipe(compensate="scale")).refined_sequences == 0
    assert work_of(Recipe()).compensation is None
