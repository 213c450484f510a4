"""Streamed layers. Oracles: the same checkpoint loaded whole, plain transformers, and what is alive in this process."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_sets import padded_set, plain_set
from checkpoints import QUICK, run_cli
from gguf_files import write_gguf
from helpers import TEXT
from tiny_models import Tiny, every_tiny, logits_of, random_model, save_tiny, tiny_model, token_ids
from transformers import AutoModelForCausalLM

from sglp_llm import prune
from sglp_llm.calibration import CalibrationSet, EvaluationWindows
from sglp_llm.criteria import GreedyCriterion, ScoreCriterion, SetCriterion, make_criterion
from sglp_llm.engine import Batch, Need, Observer, PassSettings, run_pass
from sglp_llm.engine.head import loss_and_gradient, losses
from sglp_llm.engine.loss import sequence_loss
from sglp_llm.engine.replay import Replay
from sglp_llm.engine.representations import CKAObserver
from sglp_llm.engine.states import state_store
from sglp_llm.errors import UserError
from sglp_llm.evaluation.harness import evaluate_tasks
from sglp_llm.evaluation.perplexity import perplexity
from sglp_llm.models import find_source
from sglp_llm.models.loading import DecoderModel, load_model, load_streamed
from sglp_llm.trials import Trials

ONE_PASS = ("gradnorm", "taylor", "snip", "gate", "fisher", "bi", "magnitude", "angular", "slp", "lorp")
SETS = pytest.mark.parametrize("calibration", [plain_set(5), padded_set(5, "left")], ids=["plain", "padded"])
CPU = torch.device("cpu")


def checkpoint(tiny: Tiny, folder: Path) -> Path:
    return save_tiny(tiny_model(tiny), folder / str(tiny), max_shard_size="20KB")


def whole(folder: Path) -> DecoderModel:
    return load_model(find_source(folder), "float32")


def verdicts(model: DecoderModel, calibration: CalibrationSet) -> dict[str, Any]:
    """What every criterion of one pass says, the CKA matrix and the loss."""
    criteria = {name: make_criterion(name, model.num_layers) for name in ONE_PASS}
    similarity = CKAObserver(model.num_layers, sequences=2, positions=8)
    found: dict[str, Any] = {"loss": run_pass(model, calibration, [*criteria.values(), similarity])}
    for name, criterion in criteria.items():
        if isinstance(criterion, ScoreCriterion):
            found[name] = criterion.scores()
        elif isinstance(criterion, SetCriterion):
            found[name] = criterion.choose(3, range(model.num_layers))
    found["cka"] = similarity.result().values.flatten().tolist()
    return found


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
@SETS
def test_one_pass_is_that_of_the_whole_model(tiny: Tiny, calibration: CalibrationSet, tmp_path: Path) -> None:
    folder, scratch = checkpoint(tiny, tmp_path), tmp_path / "scratch"
    scratch.mkdir()
    expected = verdicts(whole(folder), calibration)
    for place in (None, scratch):
        found = verdicts(load_streamed(find_source(folder), "float32", place), calibration)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_any_forward_pass_is_plain_transformers_and_leaves_no_layer_behind(tiny: Tiny, tmp_path: Path) -> None:
    folder = checkpoint(tiny, tmp_path)
    streamed = load_streamed(find_source(folder), "float32")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(logits_of(streamed.model, token_ids()), logits_of(plain, token_ids()))
    assert streamed.num_parameters == plain.num_parameters()
    assert {parameter.device.type for parameter in streamed.layers.parameters()} == {"meta"}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral", "gemma3_text"])
@SETS
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_trials_are_those_of_the_whole_model(
    family: str, calibration: CalibrationSet, on_disk: bool, tmp_path: Path
) -> None:
    folder = checkpoint(Tiny(family, 0), tmp_path)
    models = whole(folder), load_streamed(find_source(folder), "float32", tmp_path if on_disk else None)
    for removed in ((), (3,), (4, 1), (5, 0)):
        for name in ("sleb", "kl", "cka_output"):
            costs = []
            for model in models:
                criterion = make_criterion(name, model.num_layers)
                assert isinstance(criterion, GreedyCriterion)
                criterion.on_trials(Trials(model, calibration, batch_size=2))
                costs.append(criterion.costs(removed, [layer for layer in range(6) if layer not in removed]))
            assert costs[1] == pytest.approx(costs[0], rel=1e-5, abs=1e-7), (name, removed)


@SETS
def test_losses_and_gradient_over_chunks_are_those_of_all_logits(
    calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("llama", **Tiny("llama", 0).settings)
    replay = Replay(DecoderModel(model, Tiny("llama", 0).adapter), calibration.input_ids, calibration.mask)
    states = torch.randn(5, 24, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    each = sequence_loss(replay.logits(states), calibration.input_ids, calibration.mask)
    (gradient,) = torch.autograd.grad(each[2], states)
    expected = each.detach()
    one = Replay(DecoderModel(model, Tiny("llama", 0).adapter), calibration.input_ids[2:3], calibration.mask[2:3])
    for tokens in (2, 7, 24, 1000):
        monkeypatch.setattr("sglp_llm.engine.head.CHUNK_BYTES", tokens * 4 * 320)
        assert losses(replay, states.detach()).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
        loss, found = loss_and_gradient(one, states[2:3].detach())
        assert loss == pytest.approx(float(expected[2]), rel=1e-5)
        assert torch.allclose(found, gradient[2:3], rtol=1e-4, atol=1e-7)


def test_perplexity_is_that_of_the_whole_model(tmp_path: Path) -> None:
    folder = checkpoint(Tiny("qwen2", 0), tmp_path)
    windows = EvaluationWindows(token_ids(5, 24), "by hand", False)
    expected = perplexity(whole(folder).model, windows)
    for batch_size in (1, 2):
        found = perplexity(load_streamed(find_source(folder), "float32"), windows, batch_size=batch_size)
        assert found.mean_nll == pytest.approx(expected.mean_nll, rel=1e-6)
        assert found.nll_standard_error == pytest.approx(expected.nll_standard_error, rel=1e-5)


class LayersInMemory(Observer):
    """How many decoder layers have weights whenever something is shown."""

    needs = Need.HIDDEN_STATES | Need.GRADIENTS

    def __init__(self, model: DecoderModel) -> None:
        self.model, self.most = model, 0

    def on_gradient(self, layer: int, batch: Batch, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        present = [any(p.device.type != "meta" for p in each.parameters()) for each in self.model.layers]
        assert present[layer]
        self.most = max(self.most, sum(present))


def test_two_layers_at_most_are_in_memory(tmp_path: Path) -> None:
    model = load_streamed(find_source(checkpoint(Tiny("llama", 0), tmp_path)), "float32")
    watcher = LayersInMemory(model)
    run_pass(model, plain_set(3), [watcher])
    assert watcher.most <= 2  # the one at work, and the next one


class Broken(RuntimeError):
    pass


class Fails(Observer):
    needs = Need.GRADIENTS

    def on_gradient(self, *_: Any) -> None:
        raise Broken


def test_a_pass_that_fails_leaves_neither_weights_nor_files(tmp_path: Path) -> None:
    folder, scratch = checkpoint(Tiny("llama", 0), tmp_path), tmp_path / "scratch"
    scratch.mkdir()
    model = load_streamed(find_source(folder), "float32", scratch)
    with pytest.raises(Broken):
        run_pass(model, plain_set(3), [Fails()])
    assert not list(scratch.iterdir())
    assert {parameter.device.type for parameter in model.layers.parameters()} == {"meta"}
    expected = logits_of(whole(folder).model, token_ids())
    assert torch.equal(logits_of(model.model, token_ids()), expected)


class LiveStates(Observer):
    """How many tensors of the shape of hidden states are alive half way through the backward pass."""

    needs = Need.GRADIENT_NORMS

    def __init__(self) -> None:
        self.count = 0

    def on_gradients_end(self, layer: int, *_: Any) -> None:
        if layer == 3:
            gc.collect()
            tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
            self.count = sum(found.shape == (1, 24, 32) for found in tensors)


def test_with_scratch_memory_does_not_grow_with_the_calibration_set(tmp_path: Path) -> None:
    folder = save_tiny(random_model("llama", **Tiny("llama", 0).settings), tmp_path / "model")
    alive: dict[Path | None, list[int]] = {None: [], tmp_path: []}
    for place, counts in alive.items():
        for sequences in (8, 16):
            live = LiveStates()
            model = load_streamed(find_source(folder), "float32", place)
            observers = [make_criterion("gradnorm", 6), CKAObserver(6), live]
            run_pass(model, plain_set(sequences), observers, PassSettings(batch_size=1))
            counts.append(live.count)
    assert alive[tmp_path][0] == alive[tmp_path][1] < 8
    assert alive[None][1] > alive[None][0] > 8


@pytest.fixture
def damaged() -> dict[str, torch.Tensor]:
    return dict(random_model("llama", **Tiny("llama", 0).settings).state_dict())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.4.mlp.up_proj.weight", None, "lacks 1 tensors, 'layer 4: mlp.up_proj.weight'"),
        ("model.norm.weight", None, "lacks 1 tensors, 'model.norm.weight'"),
        (
            "model.layers.4.mlp.up_proj.weight",
            torch.zeros(3, 3),
            r"'model.layers.4.mlp.up_proj.weight' has the shape \[3, 3\]",
        ),
    ],
)
def test_a_tensor_that_is_missing_or_wrong_is_the_users_mistake(
    damaged: dict[str, torch.Tensor], name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    folder = checkpoint(Tiny("llama", 0), tmp_path)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    del damaged[name]
    if tensor is not None:
        damaged[name] = tensor
    save_file({key: value.clone() for key, value in damaged.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        run_pass(load_streamed(find_source(folder), "float32"), plain_set(2), [make_criterion("bi", 6)])


def test_a_loss_that_is_not_finite_names_the_layer(damaged: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = checkpoint(Tiny("llama", 0), tmp_path)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    damaged["model.layers.2.mlp.down_proj.weight"][:] = 3e38  # finite, and the sums are not
    save_file({key: value.clone() for key, value in damaged.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="decoder layer 2 is the first whose output is not"):
        run_pass(load_streamed(find_source(folder), "float32"), plain_set(2), [make_criterion("gradnorm", 6)])


def test_half_precision_checkpoints_keep_their_dtype_or_are_widened(tmp_path: Path) -> None:
    folder = save_tiny(tiny_model(Tiny("llama", 0)).to(torch.bfloat16), tmp_path / "model")
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        model, plain = load_streamed(find_source(folder), dtype), load_model(find_source(folder), dtype)
        assert model.model.dtype == expected
        assert torch.equal(logits_of(model.model, token_ids()), logits_of(plain.model, token_ids()))


def test_states_on_disk_are_those_that_were_put(tmp_path: Path) -> None:
    batch = Batch(0, 1, None)
    checkpoint = find_source(save_tiny(tiny_model(Tiny("llama", 0)), tmp_path / "model"))
    kept = tmp_path / "states"
    kept.mkdir()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        states = torch.randn(1, 5, 7).to(dtype)
        with state_store(load_streamed(checkpoint, scratch=kept)) as store:
            store.put("a", batch, states[:, :, ::2])
            store.share("a", "b")
            store.put("a", batch, states)
            assert torch.equal(store.get("b", batch), states[:, :, ::2])
            assert torch.equal(store.get("a", batch), states)
            store.drop("a")
            assert torch.equal(store.get("b", batch), states[:, :, ::2])
    assert not list(kept.iterdir())
    nowhere = load_streamed(checkpoint, scratch=tmp_path / "none")
    with pytest.raises(UserError, match="not a folder for scratch files"), state_store(nowhere):
        pass


def test_tasks_of_lm_eval_run_on_streamed_layers(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"q": "{n} apples and", "a": "{n} pears"}}\n' for n in range(3)))
    (tmp_path / "tasks" / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: ' {{a}}'\n"
        "metric_list: [{metric: perplexity}]\n"
    )
    suite = tmp_path / "suite.yaml"
    suite.write_text("name: tiny\ntasks: {tiny: perplexity}\ninclude_path: tasks\n")
    from sglp_llm.evaluation.suites import load_suite
    from sglp_llm.models.loading import load_tokenizer

    folder = checkpoint(Tiny("llama", 0), tmp_path)
    tokenizer = load_tokenizer(find_source(folder))
    numbers = [
        evaluate_tasks(model, tokenizer, load_suite(suite))["results"]
        for model in (whole(folder).model, load_streamed(find_source(folder), "float32").model)
    ]
    assert numbers[0] == numbers[1]


def files_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "sglp_recipe.yaml"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_prune_writes_the_same_checkpoint_with_either_engine(family: str, tmp_path: Path) -> None:
    folder, scratch = checkpoint(Tiny(family, 0), tmp_path), tmp_path / "scratch"
    scratch.mkdir()
    written = []
    for engine in (("resident",), ("streamed", "--scratch", scratch)):
        output = tmp_path / engine[0]
        run = run_cli("prune", folder, "--drop", 2, "-o", output, *QUICK, "--engine", *engine, "--json")
        assert run.code == 0, run.err
        report = json.loads(run.out)
        assert report["verification"]["max_difference"] == 0.0
        assert report["memory"]["engine"] == engine[0]
        written.append(files_in(output))
    assert written[0] == written[1]
    assert not list(scratch.iterdir())


def test_eval_prints_the_same_with_either_engine(tmp_path: Path) -> None:
    folder = checkpoint(Tiny("llama", 0), tmp_path)
    numbers = []
    for engine in ("resident", "streamed"):
        options = (
            "--data",
            TEXT,
            "--window",
            32,
            "--max-windows",
            4,
            "--batch-size",
            2,
            "--engine",
            engine,
            "--json",
        )
        run = run_cli("eval", folder, *options)
        assert run.code == 0, run.err
        numbers.append(json.loads(run.out)["mean_nll"])
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-6)
    none = run_cli("eval", folder, "--engine", "streamed", "--scratch", tmp_path / "none")
    assert "none is not a folder; make it first" in none.error


def test_gradients_beyond_float16_name_the_layer(tmp_path: Path) -> None:
    model = tiny_model(Tiny("llama", 0))
    with torch.no_grad():
        # Hidden states that are almost nothing before a final norm that makes much of them: a large gradient, small logits.
        model.model.embed_tokens.weight.mul_(1e-3)
        model.model.norm.weight.mul_(1e3)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(1e-3)
            layer.self_attn.o_proj.weight.mul_(1e-3)
    folder = save_tiny(model.to(torch.float16), tmp_path / "model")
    for engine in ("resident", "streamed"):
        run = run_cli("analyze", folder, "--drop", 1, *QUICK, "--criterion", "gradnorm", "--engine", engine)
        assert run.code == 2
        assert "layer" in run.err.splitlines()[-1], run.err
        assert "float32" in run.err.splitlines()[-1], run.err


def test_what_cannot_be_streamed_is_the_users_mistake(tmp_path: Path) -> None:
    folder = checkpoint(Tiny("llama", 0), tmp_path)
    options = ("--drop", 2, "-o", tmp_path / "out", *QUICK, "--engine", "streamed")
    no_folder = run_cli("prune", folder, *options, "--scratch", tmp_path / "none")
    assert "none is not a folder; make it first" in no_folder.error
    placed = run_cli("prune", folder, *options, "--device-map", "cpu")
    assert "device_map places a whole model" in placed.error
    with pytest.raises(UserError, match="a live model is in memory already"):
        prune(tiny_model(Tiny("llama", 0)), tmp_path / "out", drop=2, calibration=plain_set(2), engine="streamed")
    gguf = write_gguf(tmp_path / "tiny.gguf")
    assert "reads safetensors files, and this is a gguf checkpoint" in run_cli("prune", gguf, *options).error
    assert not (tmp_path / "out").exists()
