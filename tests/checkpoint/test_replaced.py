"""Plans with replaced tensors: every way to an exported checkpoint gives the model with those weights and without those layers.

The oracle is plain transformers: parameters overwritten by hand, the removed layers' ``forward`` passing through.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from checkpoints import run_cli
from gguf_files import gguf_model, write_gguf
from replaced_plans import COMPENSATION, LLAMA, NORM, new_values, overwritten, plan_with
from safetensors.torch import load_file, save_file
from tiny_models import (
    REMOVED,
    Tiny,
    every_tiny,
    files_of,
    load_plain,
    logits_of,
    save_tiny,
    shortened_logits,
    tensors_of,
    tiny_model,
    token_ids,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from sglp_llm import CalibrationSet, PrunePlan, UserError, drop_layers, prune
from sglp_llm.checkpoint.export import shortened
from sglp_llm.checkpoint.verify import VerificationError, expected_logits, verify_checkpoint
from sglp_llm.engine.modes import replaced_weights
from sglp_llm.models import find_source
from sglp_llm.models.loading import load_streamed, wrap_model
from sglp_llm.plan import plan_from_indices, save_plan


def given_ids() -> CalibrationSet:
    ids = token_ids()
    return CalibrationSet(ids, torch.ones_like(ids, dtype=torch.bool), "by hand", 0, "by hand", False)


@dataclass
class Family:
    """What the tests of one tiny configuration share; nobody changes it."""

    tiny: Tiny
    model: PreTrainedModel
    values: dict[str, torch.Tensor]
    plan: PrunePlan
    expected: torch.Tensor
    folder: Path

    def prune(self, source: Path, name: str) -> Path:
        prune(source, self.folder / name, plan=self.plan, engine="resident", verify=False)
        return self.folder / name


@pytest.fixture(scope="module", params=every_tiny(), ids=str)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    tiny: Tiny = request.param
    folder, model = tmp_path_factory.mktemp(str(tiny)), tiny_model(tiny)
    values = new_values(model, tiny.adapter.layers)
    expected = shortened_logits(overwritten(model, values), tiny.adapter.layers, REMOVED)
    assert not torch.allclose(expected, shortened_logits(model, tiny.adapter.layers, REMOVED), atol=1e-3)
    save_tiny(model, folder / "source", max_shard_size="60KB")
    return Family(tiny, model, values, plan_with(tiny, values), expected, folder)


def test_from_files(family: Family) -> None:
    """Only the layers before the cuts differ from the export of the plan without new values, in the same shards."""
    export = family.prune(family.folder / "source", "out")
    assert torch.equal(logits_of(load_plain(export)), family.expected)
    without = plan_from_indices(family.tiny.depth, REMOVED)
    prune(family.folder / "source", family.folder / "plain", plan=without, engine="resident", verify=False)
    written, plain = files_of(export), files_of(family.folder / "plain")
    assert [list(file) for file in written] == [list(file) for file in plain]
    changed = tuple(f"{family.tiny.adapter.layers}.{new}." for new in (0, 1))  # 2 is 1 once 1 is gone
    for ours, theirs in zip(written, plain, strict=True):
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            assert torch.equal(tensor, theirs[name]) != name.startswith(changed), name


def test_from_files_layer_by_layer(family: Family) -> None:
    output = family.folder / "streamed"
    report = prune(family.folder / "source", output, plan=family.plan, calibration=given_ids(), engine="streamed")
    assert report.verification is not None
    assert report.verification["max_difference"] == 0
    assert torch.equal(logits_of(load_plain(output)), family.expected)


def test_from_files_of_the_bare_decoder(family: Family) -> None:
    """gpt2 and opt on the Hub lack the first component of the path."""
    source = save_tiny(family.model, family.folder / "bare")
    outer = family.tiny.adapter.layers.split(".")[0]
    stripped = {name.removeprefix(f"{outer}."): tensor for name, tensor in tensors_of(source).items()}
    save_file(stripped, source / "model.safetensors", {"format": "pt"})
    export = family.prune(source, "bare-out")
    assert not any(name.startswith(f"{outer}.") for name in tensors_of(export))
    assert torch.equal(logits_of(load_plain(export)), family.expected)


def test_from_files_with_the_names_that_the_model_has(family: Family) -> None:
    """Mixtral's experts, stacked: transformers loads that as well."""
    source = save_tiny(family.model, family.folder / "own-names")
    tied = family.model.config.tie_word_embeddings
    tensors = {
        name: tensor.clone()
        for name, tensor in family.model.state_dict().items()
        if not (tied and name in family.model._tied_weights_keys)
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    export = family.prune(source, "own-names-out")
    assert torch.equal(logits_of(load_plain(export)), family.expected)


def test_from_a_live_model(family: Family) -> None:
    model = deepcopy(family.model)
    assert drop_layers(model, family.plan) is model
    assert torch.equal(logits_of(model), family.expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(bool(value.any()) for value in family.values.values())  # the plan's own are not the model's
    live = deepcopy(family.model)
    report = prune(live, family.folder / "live", plan=family.plan, calibration=given_ids())
    assert report.verification is not None
    assert report.verification["max_difference"] == 0
    assert torch.equal(logits_of(load_plain(family.folder / "live")), family.expected)


def test_for_a_while(family: Family) -> None:
    before = logits_of(family.model)
    with shortened(family.model, REMOVED, family.values) as model:
        assert torch.equal(logits_of(model), family.expected)
    assert torch.equal(logits_of(family.model), before)


@pytest.mark.parametrize(("dtype", "engine"), [("auto", "resident"), ("float32", "streamed")])
def test_a_half_precision_checkpoint_keeps_its_dtype(family: Family, dtype: str, engine: str, tmp_path: Path) -> None:
    """New values that came in float32 are rounded, before the reload check computes with them."""
    source = save_tiny(deepcopy(family.model).to(torch.bfloat16), tmp_path / "source")
    report = prune(source, tmp_path / "out", plan=family.plan, calibration=given_ids(), dtype=dtype, engine=engine)
    assert report.verification is not None
    assert report.verification["max_difference"] == 0
    assert report.verification["dtype"] == ("bfloat16" if dtype == "auto" else "float32")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    rounded = {name: value.bfloat16() for name, value in family.values.items()}
    oracle = overwritten(load_plain(source, dtype=torch.float32), rounded)
    expected = shortened_logits(oracle, family.tiny.adapter.layers, REMOVED)
    assert torch.equal(logits_of(load_plain(tmp_path / "out", dtype=torch.float32)), expected)


def test_tensors_of_one_layer_in_different_dtypes(tmp_path: Path) -> None:
    model = tiny_model(LLAMA)
    source = save_tiny(model, tmp_path / "source")
    tensors = {name: t if "norm" in name else t.bfloat16() for name, t in tensors_of(source).items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = prune(source, tmp_path / "out", plan=plan_with(LLAMA, new_values(model, "model.layers")), dtype="float32")
    assert report.verification is not None
    assert report.verification["max_difference"] == 0
    assert all((t.dtype == torch.float32) == ("norm" in name) for name, t in tensors_of(tmp_path / "out").items())


def test_the_reload_check_notices_weights_that_were_not_replaced(tmp_path: Path) -> None:
    model = tiny_model(LLAMA)
    values = new_values(model, "model.layers")
    source = save_tiny(model, tmp_path / "source")
    prune(source, tmp_path / "plain", plan=plan_from_indices(6, REMOVED))
    for decoder in (wrap_model(model), load_streamed(find_source(source))):
        expected = expected_logits(decoder, REMOVED, token_ids(), values)
        with pytest.raises(VerificationError, match="differ"):
            verify_checkpoint(tmp_path / "plain", expected, torch.float32, "cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small Llama."""
    return save_tiny(tiny_model(LLAMA), tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def plan() -> PrunePlan:
    return plan_with(LLAMA, new_values(tiny_model(LLAMA), "model.layers"))


@pytest.fixture(scope="module")
def expected(plan: PrunePlan) -> torch.Tensor:
    return shortened_logits(overwritten(tiny_model(LLAMA), dict(plan.replaced)), "model.layers", REMOVED)


def test_from_bin_files(tiny: Path, plan: PrunePlan, expected: torch.Tensor, tmp_path: Path) -> None:
    source = save_tiny(tiny_model(LLAMA), tmp_path / "source")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    save_plan(plan, tmp_path / "mine.json")
    outcome = run_cli("prune", source, "-o", tmp_path / "out", "--plan", tmp_path / "mine.json")
    assert outcome.code == 0, outcome
    assert torch.equal(logits_of(load_plain(tmp_path / "out")), expected)


def test_from_gguf(tmp_path: Path) -> None:
    model = gguf_model()
    values = new_values(model, "model.layers")
    save_plan(plan_with(LLAMA, values), tmp_path / "mine.json")
    file = write_gguf(tmp_path / "tiny.gguf")
    outcome = run_cli("prune", file, "-o", tmp_path / "out", "--plan", tmp_path / "mine.json")
    assert outcome.code == 0, outcome
    expected = shortened_logits(overwritten(model, values), "model.layers", REMOVED)
    assert torch.equal(logits_of(load_plain(tmp_path / "out")), expected)


def test_the_command_line_says_so_and_the_output_is_a_plan_again(tiny: Path, plan: PrunePlan, tmp_path: Path) -> None:
    save_plan(plan, tmp_path / "sglp_plan.json")
    outcome = run_cli("prune", tiny, "-o", tmp_path / "out", "--plan", tmp_path)
    assert outcome.code == 0, outcome
    assert f"Compensation      linear, {len(plan.replaced)} tensors replaced\n" in outcome.out
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- Compensated by `linear` for the cuts 1..1, 3..3: {len(plan.replaced)} tensors" in card
    again = run_cli("prune", tiny, "-o", tmp_path / "again", "--plan", tmp_path / "out", "--json")
    assert again.code == 0, again
    report = json.loads(again.out)
    assert report["plan"]["compensation"] == COMPENSATION
    shapes = {name: list(value.shape) for name, value in plan.replaced.items()}
    assert report["plan"]["replaced"] == {"tensors": shapes}
    assert report["bytes_written"] == (tmp_path / "again" / "model.safetensors").stat().st_size
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"sglp_plan.json", "sglp_plan.tensors"} <= files
    for name in files - {"sglp_recipe.yaml"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_other_programs_that_load_every_safetensors_file_of_the_folder_find_the_model_alone(
    tiny: Path, plan: PrunePlan, tmp_path: Path
) -> None:
    prune(tiny, tmp_path / "out", plan=plan, verify=False)
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_a_card_of_a_plan_that_says_less(tiny: Path, plan: PrunePlan, tmp_path: Path) -> None:
    for number, compensation in enumerate(
        ({}, {"method": 3, "cuts": [1]}, {"cuts": [{"start": 1, "stop": "2"}]}, {"losses": {"fit": 3}})
    ):
        output = tmp_path / str(number)
        prune(tiny, output, plan=replace(plan, compensation=compensation), verify=False)
        assert (
            f"- Compensated by tensors that came with the plan: {len(plan.replaced)}"
            in (output / "README.md").read_text()
        )


WRONG: list[tuple[dict[str, torch.Tensor], str]] = [
    ({"model.layers.1.input_layernorm.weight": torch.ones(32)}, "belongs to layer 1, which the plan removes"),
    ({"model.norm.weight": torch.ones(32)}, "'model.norm.weight' is not the name of a parameter of layers 0..5"),
    ({"model.layers.6.input_layernorm.weight": torch.ones(32)}, "is not the name of a parameter of layers 0..5"),
    ({"model.layers.0.mlp.w2.weight": torch.ones(32)}, "'model.layers.0.mlp.w2.weight', and the model has no such"),
    ({NORM: torch.ones(31)}, f"'{NORM}' by a tensor of the shape [31]; the model's has [32]"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("verify", [False, True])
def test_new_values_that_do_not_fit(
    values: dict[str, torch.Tensor], message: str, live: bool, verify: bool, tiny: Path, tmp_path: Path
) -> None:
    model = tiny_model(LLAMA)
    before = logits_of(model)
    with pytest.raises(UserError) as raised:
        prune(
            model if live else tiny,
            tmp_path / "out",
            plan=plan_with(LLAMA, values),
            calibration=given_ids(),
            verify=verify,
        )
    assert message in str(raised.value)
    with pytest.raises(UserError) as raised:
        drop_layers(model, plan_with(LLAMA, values))
    assert message in str(raised.value)
    assert torch.equal(logits_of(model), before)
    assert not (tmp_path / "out").exists()


def test_numbers_beyond_the_files_dtype(tiny: Path, tmp_path: Path) -> None:
    half = save_tiny(tiny_model(LLAMA).half(), tmp_path / "half")
    plan = plan_with(LLAMA, {NORM: torch.full((32,), 1e6)})
    with pytest.raises(UserError, match=f"'{NORM}' by numbers that are not finite in float16"):
        prune(half, tmp_path / "out", plan=plan, verify=False)
    prune(tiny, tmp_path / "out", plan=plan, verify=False)


def test_a_tensor_that_the_files_lack(tmp_path: Path) -> None:
    """Its place in the model alone does not make it one of the checkpoint's."""
    model = tiny_model(LLAMA)
    source = save_tiny(model, tmp_path / "source")
    tensors = tensors_of(source)
    del tensors[NORM]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"source: the plan replaces '{NORM}', and no stored tensor belongs to it"):
        prune(source, tmp_path / "out", plan=plan_with(LLAMA, {NORM: torch.ones(32)}), verify=False)
    assert not (tmp_path / "out").exists()


def test_weights_that_accelerate_keeps_elsewhere_cannot_be_replaced(plan: PrunePlan) -> None:
    model = cpu_offload(AutoModelForCausalLM.from_config(tiny_model(LLAMA).config))
    with pytest.raises(UserError, match="accelerate keeps 'model"):
        drop_layers(model, plan)
    with pytest.raises(UserError, match="out of memory"), replaced_weights(wrap_model(model), plan.replaced):
        pass
