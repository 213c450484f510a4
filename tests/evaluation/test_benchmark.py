"""Counts against what torch counts itself; what is measured, how often and in which order; the verb."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import run_cli, save_tiny
from checkpoints import tiny_model as seeded_model
from gguf_files import write_gguf
from model_bytes import cache_after, cache_bytes
from tiny_models import Tiny, every_tiny, greedy, tiny_model, token_ids
from torch.utils.flop_counter import FlopCounterMode

from sglp_llm.cli.bench_table import table, to_dict
from sglp_llm.errors import UserError
from sglp_llm.evaluation import benchmark as module
from sglp_llm.evaluation.benchmark import BenchmarkSettings, Measured, benchmark, ratios
from sglp_llm.evaluation.benchmark import greedy as timed_greedy
from sglp_llm.evaluation.costs import count_costs
from sglp_llm.evaluation.memory import PHASE_PEAK, PROCESS_PEAK, Held, devices_of, held, watch_peak
from sglp_llm.models.loading import wrap_model
from sglp_llm.models.opened import OpenedModel
from sglp_llm.progress import Advance

QUICK = ("--prompt-len", 8, "--new-tokens", 3, "--batch", 2, "--repeats", 2)
SETTINGS = BenchmarkSettings(prompt_len=8, new_tokens=3, batch=2, warmup=1, repeats=3)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "deep")


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "shallow", num_hidden_layers=3)


@pytest.mark.parametrize("context", [5, 40], ids=["within-windows", "beyond-windows"])  # the tiny windows are 8 tokens
@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_flops_and_cache_are_what_torch_counts(tiny: Tiny, context: int) -> None:
    model = tiny_model(tiny)
    model.set_attn_implementation("eager")  # torch does not count the CPU's fused attention,
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")  # nor its grouped experts
    cache = cache_after(model, context - 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=token_ids(1)[:, context - 1 : context], past_key_values=cache, use_cache=True)
    costs = count_costs(wrap_model(model), context)
    assert costs.flops_per_token == counter.get_total_flops()
    assert costs.kv_cache_bytes == cache_bytes(cache)
    assert costs.kv_cache_bytes_per_token == cache_bytes(cache_after(model, 5)) - cache_bytes(cache_after(model, 4))


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_parameters_are_counted_once(tiny: Tiny) -> None:
    model = tiny_model(tiny)
    costs = count_costs(wrap_model(model), 1)
    stored = {tensor.data_ptr(): tensor for tensor in dict(model.named_parameters(remove_duplicate=False)).values()}
    layers = [tensor for name, tensor in model.named_parameters() if f"{tiny.adapter.layers}." in name]
    assert costs.parameters == sum(tensor.numel() for tensor in stored.values())
    assert costs.layer_parameters == sum(tensor.numel() for tensor in layers)
    assert costs.weight_bytes == 4 * costs.parameters
    assert costs.layers == tiny.depth
    half = count_costs(wrap_model(model.bfloat16()), 1)
    assert (half.weight_bytes, half.kv_cache_bytes) == (costs.weight_bytes / 2, costs.kv_cache_bytes / 2)
    assert half.flops_per_token == costs.flops_per_token


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_the_timed_generation_is_the_library_s(family: str) -> None:
    model, prompt = tiny_model(Tiny(family, 0)), token_ids()[:, :12]
    with torch.inference_mode():
        result = timed_greedy(wrap_model(model), prompt, 20)
    assert torch.equal(result.tokens, greedy(model, prompt, use_cache=True)[:, 12:])


def test_two_models_are_measured_in_turns_and_the_turns_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[int, int]] = []
    clock = iter(range(1, 1000))

    def measured(model: Any, prompt: torch.Tensor, new_tokens: int, devices: Any) -> Any:
        order.append((model.num_layers, len(prompt)))
        assert prompt.shape[1] == 8
        return module.Greedy(prompt, 2.0, float(next(clock)))

    monkeypatch.setattr(module, "greedy", measured)
    opened_models = [OpenedModel(seeded_model()), OpenedModel(seeded_model(num_hidden_layers=3))]
    deep, shallow = benchmark(opened_models, SETTINGS)
    first, second = [(6, 1), (6, 2)], [(3, 1), (3, 2)]
    assert order == [*first, *second, *first, *second, *second, *first, *first, *second]
    one, two = shallow.speeds  # its timed runs are the 7th and 8th, the 9th and 10th, the 15th and 16th
    assert (one.batch, two.batch) == (1, 2)
    assert one.first_token_seconds == Measured(2.0, 2.0, 2.0, (2.0, 2.0, 2.0))
    assert one.prefill_tokens_per_second.values == (4, 4, 4)
    assert two.prefill_tokens_per_second.values == (8, 8, 8)
    assert one.decode_tokens_per_second == Measured(2 / 9, 2 / 15, 2 / 7, (2 / 7, 2 / 9, 2 / 15))
    assert two.decode_tokens_per_second.values == (4 / 8, 4 / 10, 4 / 16)
    assert (deep.costs.layers, shallow.costs.layers) == (6, 3)


def test_ratios_are_taken_repeat_by_repeat() -> None:
    over, under = Measured(3, 2, 9, (2, 9, 3)), Measured(4, 1, 9, (1, 9, 4))
    assert ratios(over, under) == Measured(1.0, 0.75, 2.0, (2.0, 1.0, 0.75))


def test_a_model_is_left_as_it_was() -> None:
    model = seeded_model("opt").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (result,) = benchmark([OpenedModel(model)], SETTINGS)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (result.dtype, result.device, result.peak_device_bytes) == ("float32", "cpu", None)
    assert result.peak_host_bytes is None or result.peak_host_bytes >= 0
    assert all(number > 0 for speed in result.speeds for number in speed.decode_tokens_per_second.values)
    assert [len(speed.first_token_seconds.values) for speed in result.speeds] == [3, 3]


def test_one_sequence_only_is_measured_once() -> None:
    (result,) = benchmark([OpenedModel(seeded_model())], BenchmarkSettings(8, 2, batch=1, repeats=1))
    assert [speed.batch for speed in result.speeds] == [1]


def test_progress_hears_of_every_generation() -> None:
    heard: list[object] = []

    @contextmanager
    def listen(description: str, total: int) -> Iterator[Advance]:
        heard.append((description, total))
        yield heard.append

    benchmark([OpenedModel(seeded_model()), OpenedModel(seeded_model())], SETTINGS, listen)
    assert heard == [("Measuring", 16), *[1] * 16]


def test_the_peak_of_a_phase_holds_what_was_there_only_for_a_while() -> None:
    before = held()
    with watch_peak([], before) as peak:
        torch.ones(64 * 2**20, dtype=torch.uint8).sum().item()
    assert peak.host is not None
    assert peak.host_method in (PHASE_PEAK, PROCESS_PEAK)
    assert peak.host >= 60 * 2**20
    with watch_peak([], held()) as small:
        torch.ones(2**10).sum().item()
    if small.host_method == PHASE_PEAK:
        assert small.host is not None
        assert small.host < 30 * 2**20


def test_a_system_that_resets_no_peak_gets_the_process_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sglp_llm.evaluation.memory._CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    with watch_peak([], held()) as peak:
        pass
    assert peak.host_method == PROCESS_PEAK
    assert peak.host is not None
    assert peak.host > 50 * 2**20  # torch alone takes more


def test_device_memory_is_each_device_s_peak_beyond_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = seeded_model(), []
    model.hf_device_map = {"model.embed_tokens": 1, "model.layers": "cuda:0", "model.norm": "cpu", "lm_head": "disk"}
    devices = devices_of(model)
    assert devices == [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(("reset", device.index)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("wait", device.index)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: [1000, 500][device.index])
    with watch_peak(devices, Held(0, {0: 300, 1: 0, 2: 7})) as peak:
        calls.append(("work", 0))
    assert peak.device == 1200
    assert calls == [("reset", 0), ("reset", 1), ("work", 0), ("wait", 0), ("wait", 1)]


def test_a_device_map(deep: Path) -> None:
    outcome = run_cli("bench", deep, *QUICK, "--device-map", "auto", "--json")
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["model"]["device"] in ("cpu", "cuda:0")


def test_json_of_one_model(deep: Path) -> None:
    outcome = run_cli("bench", deep, *QUICK, "--json")
    data = json.loads(outcome.out)
    assert outcome.err.startswith("Measuring")
    assert set(data) == {"settings", "environment", "model", "baseline", "ratios"}
    assert (data["baseline"], data["ratios"]) == (None, None)
    assert data["settings"] == asdict(BenchmarkSettings(8, 3, 2, 1, 2))
    assert data["model"]["model"] == str(deep)
    assert data["model"]["costs"]["context"] == 11
    assert [len(speed["decode_tokens_per_second"]["values"]) for speed in data["model"]["speeds"]] == [2, 2]


def test_json_with_a_baseline(deep: Path, shallow: Path) -> None:
    data = json.loads(run_cli("bench", shallow, "--baseline", deep, *QUICK, "--json", "--dtype", "bfloat16").out)
    model, baseline = data["model"], data["baseline"]
    assert (model["model"], baseline["model"]) == (str(shallow), str(deep))
    assert (model["dtype"], baseline["dtype"]) == ("bfloat16", "bfloat16")
    assert data["ratios"]["layers"] == 0.5
    assert data["ratios"]["parameters"] == model["costs"]["parameters"] / baseline["costs"]["parameters"]
    over, under = (one["speeds"][1]["decode_tokens_per_second"]["values"] for one in (model, baseline))
    expected = [value / base for value, base in zip(over, under, strict=True)]
    assert data["ratios"]["decode_tokens_per_second_batch_2"]["values"] == expected


def test_text_of_one_model_and_of_a_gguf(deep: Path, tmp_path: Path) -> None:
    for name, parameters in ((deep, "67.0K"), (write_gguf(tmp_path / "tiny.gguf"), "74.9K")):
        lines = run_cli("bench", name, *QUICK).out.splitlines()
        assert lines[0] == f"Model       {name} (float32, cpu)"
        rows = [line.split() for line in lines]
        assert ["Parameters", parameters] in rows
        assert not any("ratio" in row for row in rows)
        assert {"batch 1", "batch 2"} <= {line.strip() for line in lines}


def test_text_with_a_baseline(deep: Path, shallow: Path) -> None:
    lines = run_cli("bench", shallow, "--baseline", deep, *QUICK).out.splitlines()
    rows = [line.split() for line in lines]
    assert lines[1] == f"Baseline    {deep} (float32, cpu)"
    assert ["baseline", "model", "ratio"] in rows
    assert ["Decoder", "layers", "6", "3", "0.50"] in rows
    assert ["KV", "cache", "a", "token", "768B", "384B", "0.50"] in rows


def test_the_table_shows_what_json_holds() -> None:
    measured = benchmark([OpenedModel(seeded_model()), OpenedModel(seeded_model(num_hidden_layers=3))], SETTINGS)
    columns, rows = table(measured)
    assert all(len(row) == len(columns) == 4 for row in rows)
    data = to_dict(measured, SETTINGS)
    numbers = [row for row in rows if any(row[1:])]
    assert len(numbers) == len(data["ratios"])
    by_label = {row[0]: row for row in rows}
    assert by_label["  FLOPs a token"][3] == f"{data['ratios']['flops_per_token']:.2f}"
    json.dumps(data, allow_nan=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--prompt-len 97",
            "97 prompt tokens and 32 new ones are more than the model's 128 positions; lower prompt_len",
        ),
        ("--prompt-len 0", "prompt_len must be at least 1, not 0"),
        ("--new-tokens 1", "new_tokens must be at least 2, not 1: the first one is timed with the prompt"),
        ("--batch 0", "batch must be at least 1"),
        ("--warmup 0", "warmup must be at least 1, not 0: memory is measured in the warm-up"),
        ("--repeats 0", "repeats must be at least 1"),
        ("--dtype int8", "auto or bfloat16 or float16 or float32"),
        ("--baseline /nowhere/model", "/nowhere/model: there is no such folder or file"),
        ("--baseline-revision main", "give --baseline OTHER too"),
        ("--revision main", "a revision is for models on the Hub"),
    ],
)
def test_refusals(deep: Path, options: str, message: str) -> None:
    outcome = run_cli("bench", deep, *options.split())
    assert outcome.code == 2
    assert message in outcome.error


def test_the_longest_prompt_that_fits() -> None:
    opened = OpenedModel(seeded_model())
    (result,) = benchmark([opened], BenchmarkSettings(126, 2, batch=1, repeats=1))
    assert result.costs.context == 128
    with pytest.raises(UserError, match="127 prompt tokens and 2 new ones are more than the model's 128 positions"):
        benchmark([opened], BenchmarkSettings(127, 2, batch=1, repeats=1))
