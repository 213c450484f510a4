"""Predicted memory: counts against plain transformers, the dry run against autograd, the whole against a measured process."""

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
from checkpoints import QUICK, Outcome, copied, edited, run_cli, save_tiny, without
from tiny_models import Tiny, every_tiny, tiny_model, token_ids
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from sglp_llm.engine.dry_run import DryRun
from sglp_llm.engine.observer import Need
from sglp_llm.free_memory import free_memory, host_free
from sglp_llm.memory import RUNTIME, Work, choose_engine, fits, plan_memory
from sglp_llm.parameter_counts import count_parameters
from sglp_llm.prediction import chosen_engine, forecast, predict_memory, work_of
from sglp_llm.recipe import Recipe
from sglp_llm.records import EngineMemory, FreeMemory, MemoryPlan
from sglp_llm.subject import Subject
from sglp_llm.verbs.memory_table import forecast_line

ROOT = Path(__file__).parents[1]
GRADIENTS = Work(Need.GRADIENT_NORMS, samples=4, seq_len=64, trial_samples=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


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
        assert gpu.device_peak == cpu.host_peak - stored - RUNTIME
        assert gpu.host.get("hidden states", 0) == stored
    assert there.resident.host["weights"] == there.resident.device["weights"]  # type: ignore[index]
    moved = plan_memory(llama(), torch.float32, replace(work, sums_on_host=True), True).resident
    sums = 4 * 4 * (4 * 64 * 64 + 3 * 64 * 96)
    assert moved.host["gradients"] == sums
    assert moved.device_peak == (there.resident.device_peak or 0) - sums


def test_trials_store_one_set_of_states_a_layer() -> None:
    work = Work(Need.TRIALS, samples=8, seq_len=64, trial_samples=2)
    plan = plan_memory(llama(), torch.float32, work, False)
    assert plan.streamed.host["hidden states"] == (4 + 2) * 2 * 64 * 64 * 4
    assert plan.resident.host["hidden states"] == (4 + 2) * 64 * 64 * 4


def test_what_a_recipe_does() -> None:
    assert work_of(Recipe()).needs == Need.HIDDEN_STATES | Need.GRADIENT_NORMS
    assert work_of(Recipe(criterion="magnitude")).needs == Need.WEIGHTS
    assert work_of(Recipe(criterion="search")).needs == Need.HIDDEN_STATES | Need.TRIALS
    work = work_of(Recipe(criterion="bi", also=("taylor", "kl"), samples=4, trial_samples=9, scratch="x"))
    assert work.needs == Need.HIDDEN_STATES | Need.GRADIENTS | Need.TRIALS
    assert (work.trial_samples, work.batch_size, work.scratch, work.sums_on_host) == (4, 4, True, False)
    assert work_of(Recipe(criterion="taylor", options={"taylor": {"accumulator": "host"}})).sums_on_host
    assert (
        predict_memory(llama(), Recipe(dtype="bfloat16")).resident.host["weights"] * 2
        == (predict_memory(llama(), Recipe(dtype="float32")).resident.host["weights"])
    )


# The choice


def engines(resident: int, streamed: int, device: int | None = None) -> MemoryPlan:
    on_device = None if device is None else {"weights": device}
    return MemoryPlan(
        EngineMemory("resident", {"weights": resident}, on_device, 0),
        EngineMemory("streamed", {"weights": streamed}, None, 50),
    )


@pytest.mark.parametrize(
    ("plan", "free", "chosen"),
    [
        (engines(90, 10), FreeMemory(100), "resident"),
        (engines(91, 10), FreeMemory(100), "streamed"),
        (engines(91, 92), FreeMemory(100), "streamed"),
        (engines(91, 10), FreeMemory(None), "resident"),
        (engines(10, 10, 91), FreeMemory(1000, 100), "streamed"),
        (engines(10, 10, 90), FreeMemory(1000, 100), "resident"),
    ],
)
def test_resident_where_it_fits(plan: MemoryPlan, free: FreeMemory, chosen: str) -> None:
    assert choose_engine(plan, free) == chosen


def test_a_full_disk_does_not_fit() -> None:
    assert fits(engines(1, 1).streamed, FreeMemory(100, disk=56))
    assert not fits(engines(1, 1).streamed, FreeMemory(100, disk=55))


def test_the_engine_of_a_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, live = Subject(tiny), Subject(tiny_model(every_tiny()[0]))
    assert chosen_engine(subject, Recipe(engine="streamed")) == "streamed"
    assert chosen_engine(subject, Recipe(engine="resident")) == "resident"
    assert chosen_engine(subject, Recipe()) == "resident"
    monkeypatch.setattr("sglp_llm.prediction.free_memory", lambda *_: FreeMemory(1))
    assert chosen_engine(subject, Recipe()) == "streamed"
    assert forecast(subject, Recipe()) == (predict_memory(subject.config, Recipe()).streamed, FreeMemory(1))
    assert chosen_engine(subject, Recipe(device_map="auto")) == "resident"
    assert chosen_engine(live, Recipe()) == "resident"


def test_engines_do_not_tell_in_the_plan(tiny: Path) -> None:
    plan = json.loads(run_cli("analyze", tiny, *QUICK, "--engine", "resident", "--json").out)["plan"]
    assert not {"engine", "scratch"} & set(plan["settings"])


# What is free


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       9000 kB\nMemFree:  10 kB\nMemAvailable:    5000 kB\n"}
V2 = {"proc/self/cgroup": "0::/outer/inner\n", "sys/fs/cgroup/outer/inner/memory.max": "max\n"}
V2 |= {"sys/fs/cgroup/outer/inner/memory.current": "700\n", "sys/fs/cgroup/outer/memory.current": "900\n"}
V2 |= {"sys/fs/cgroup/outer/memory.stat": "anon 500\ninactive_file 300\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n", "sys/fs/cgroup/memory/memory.usage_in_bytes": "100"}
V1 |= {"sys/fs/cgroup/memory/memory.stat": "inactive_file 7\ntotal_inactive_file 30\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, 5000 * 1024),
        ({**MEMINFO, **V2, "sys/fs/cgroup/outer/memory.max": "1000"}, 1000 - 900 + 300),
        ({**MEMINFO, **V2, "sys/fs/cgroup/outer/memory.max": "500"}, 0),
        ({**MEMINFO, **V2, "sys/fs/cgroup/outer/memory.max": "max"}, 5000 * 1024),
        ({**MEMINFO, **V2, "sys/fs/cgroup/outer/memory.max": f"{2**40}"}, 5000 * 1024),
        ({**MEMINFO, **V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000"}, 4000 - 100 + 30),
        ({**MEMINFO, **V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, 5000 * 1024),
        ({**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000"}, 4000 - 100 + 30),
    ],
)
def test_free_on_the_host(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert host_free(tree(tmp_path, files)) == expected


def test_free_without_proc(tmp_path: Path) -> None:
    pages = host_free(tmp_path)
    assert pages is None or 0 < pages <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_free_on_the_disk_of_a_folder_to_come(tmp_path: Path) -> None:
    there = free_memory(scratch=str(tmp_path / "not" / "yet")).disk
    assert there is not None
    assert there > 0
    assert free_memory().disk is None


# The command


def plan_memory_of(*arguments: object) -> tuple[Outcome, dict[str, Any]]:
    outcome = run_cli("plan-memory", *arguments, "--json")
    return outcome, json.loads(outcome.out) if outcome.code == 0 else {}


def test_plan_memory_needs_no_weights(tiny: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny / "config.json").read_bytes())
    outcome, planned = plan_memory_of(bare)
    assert (outcome.code, outcome.err) == (0, "")
    assert planned["engines"] == plan_memory_of(tiny)[1]["engines"]
    assert planned["auto"] == "resident"
    assert set(planned["free"]) == {"host", "device", "disk"}
    expected = predict_memory(AutoConfig.from_pretrained(tiny), Recipe()).resident
    assert planned["engines"]["resident"]["host"] == dict(expected.host)
    assert planned["engines"]["resident"]["host_peak"] == expected.host_peak


def test_plan_memory_prints_a_table(tiny: Path, tmp_path: Path) -> None:
    outcome = run_cli("plan-memory", tiny, "--also", "taylor", "--scratch", tmp_path / "to come", "--samples", 64)
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert lines[0].endswith(": sglp, taylor in float32, 64 x 512 tokens")
    assert lines[1].split() == ["resident,", "host", "streamed,", "host"]
    labels = [line.split("  ")[0] for line in lines[2:-1]]
    assert labels[-5:] == ["runtime", "peak", "free now", "scratch on disk", "free on disk"]
    assert lines[-1].startswith("Engine auto takes here: resident (both fit; ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "which model?"),
        ("./nowhere", "./nowhere: there is no such folder or file"),
        ("{tiny} --criterion gradnrm", "did you mean 'gradnorm'?"),
        ("{tiny} --samples 0", "samples must be at least 1"),
        ("{tiny} --dtype int8", "dtype must be auto or bfloat16"),
        ("{tiny} --revision v1", "a revision is for models on the Hub"),
        ("{empty}", "no config.json"),
        ("{odd}", "the memory cannot be predicted: a model of this configuration does not run"),
        ("{unknown}", "unknown model family"),
    ],
)
def test_plan_memory_refuses(options: str, message: str, tiny: Path, tmp_path: Path) -> None:
    folders = {"tiny": tiny, "empty": copied(tiny, tmp_path / "empty", without("config.json"))}
    folders["odd"] = copied(tiny, tmp_path / "odd", edited("config.json", num_key_value_heads=3))
    folders["unknown"] = copied(tiny, tmp_path / "unknown", edited("config.json", model_type="lama"))
    outcome = run_cli("plan-memory", *options.format(**folders).split())
    assert outcome.code == 2, outcome
    assert message in outcome.error


def test_plan_memory_knows_presets(tiny: Path) -> None:
    outcome = run_cli("plan-memory", tiny, "--preset", "best", "--samples", 8, "--seq-len", 32)
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert lines[0].endswith(": search + learned in float32, 8 x 32 tokens")
    assert any(line.startswith("refined weights ") for line in lines)


def test_of_a_model_on_the_hub_the_configuration_alone_is_fetched(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append((repo, options["revision"], options["allow_patterns"]))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    outcome, _ = plan_memory_of("owner/name", "--revision", "v1")
    assert outcome.code == 0, outcome
    assert asked == [("owner/name", "v1", ["config.json"])]


# The first and the last line of a run


def test_the_forecast_in_words() -> None:
    gigabyte = 10**9
    memory = EngineMemory("resident", {"weights": gigabyte, "runtime": gigabyte // 10}, None, 0)
    free = FreeMemory(14 * gigabyte, 80 * gigabyte)
    assert forecast_line(memory, free) == "Memory: about 1.1 GB predicted (resident engine), 14 GB free"
    both = EngineMemory("streamed", {"weights": gigabyte}, {"weights": 2 * gigabyte}, 3 * gigabyte)
    assert forecast_line(both, free) == (
        "Memory: about 2.0 GB on the device and 1.0 GB on the host and 3.0 GB on disk predicted (streamed engine), "
        "80 GB and 14 GB and unknown free"
    )


def test_a_run_begins_with_the_forecast_and_ends_with_the_peak(tiny: Path, tmp_path: Path) -> None:
    outcome = run_cli("analyze", tiny, *QUICK)
    assert outcome.err.splitlines()[0].startswith("Memory: about ")
    assert outcome.out.splitlines()[-1].startswith("Peak memory       ")
    outcome = run_cli("prune", tiny, "-o", tmp_path / "out", *QUICK, "--drop", 1, "--json")
    memory = json.loads(outcome.out)["memory"]
    assert memory["engine"] == "resident"
    assert memory["predicted_host_bytes"] > RUNTIME
    assert memory["peak_host_bytes"] > 100 * 2**20  # torch alone takes more
    planned = run_cli("prune", tiny, "-o", tmp_path / "again", "--plan", tmp_path / "out" / "sglp_plan.json")
    assert planned.out.splitlines()[-1].startswith("Peak memory       ")
    assert "Memory: about" not in planned.err


@pytest.mark.slow
def test_the_peak_of_a_process_is_near_the_prediction(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, vocab_size=8000
    )
    source = save_tiny(tmp_path / "source")  # for its tokenizer
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    command = [sys.executable, "-m", "sglp_llm", "analyze", str(source), *QUICK[:2], "--samples", "1"]
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
