"""The reload check on exports that are right, and on exports that were edited to be wrong in one way each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_sets import plain_set
from safetensors.torch import save_file
from tiny_models import REMOVED, Tiny, load_plain, logits_of, save_tiny, tensors_of, tiny_model, token_ids
from transformers import AutoModelForCausalLM, PreTrainedModel

from sglp_llm import pipeline, prune
from sglp_llm.checkpoint.verify import (
    HALF_PRECISION_TOLERANCE,
    Expected,
    Verification,
    VerificationError,
    expected_logits,
    verify_checkpoint,
)
from sglp_llm.models.loading import wrap_model
from sglp_llm.plan import plan_from_indices

GEMMA = Tiny("gemma2", 0)
PLAN = plan_from_indices(6, REMOVED)
IDS = token_ids(2, 40)

Sabotage = Callable[[Path], None]


def exported(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Expected]:
    """A good export, and what it must compute."""
    source = save_tiny(tiny_model(GEMMA).to(dtype), folder / "source")
    prune(source, folder / "out", plan=PLAN, verify=False)
    # Loaded again, because .to(dtype) has made the rotary frequencies coarser too.
    return folder / "out", expected_logits(wrap_model(load_plain(source)), REMOVED, IDS)


def check(folder: Path, expected: Expected, dtype: torch.dtype = torch.float32) -> Verification:
    return verify_checkpoint(folder, expected, dtype, "cpu")


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = tensors_of(folder)
    edit(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def swap_layers(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            other = name.replace(".layers.1.", ".layers.2.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    edit_tensors(folder, edit)


def swap_two_tensors(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        one, other = (f"model.layers.{layer}.post_feedforward_layernorm.weight" for layer in (0, 3))
        tensors[one], tensors[other] = tensors[other], tensors[one]

    edit_tensors(folder, edit)


def flip_one_bit(folder: Path) -> None:
    """The lowest bit of the exponent of one number: it is doubled or halved."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"].view(torch.int32)[5, 7] ^= 1 << 23

    edit_tensors(folder, edit)


def lose_a_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.2.mlp.down_proj.weight"))


def keep_a_removed_layer(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.4.mlp.up_proj.weight": torch.ones(48, 32)}))


def change_a_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(48, 31)}))


def put_a_nan(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))


def derive_layer_types_anew(folder: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    assert json.loads((folder / "config.json").read_text())["layer_types"] != kinds * 2
    edit_config(folder, layer_types=kinds * 2)


def keep_the_depth(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3)


def forget_a_layer(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3, layer_types=["sliding_attention"] * 3)


def forget_layer_types(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


LOAD, DIFFERENT = "does not load|keys in", "logits of .* differ"
SABOTAGES = [
    (swap_layers, DIFFERENT),
    (swap_two_tensors, DIFFERENT),
    (flip_one_bit, DIFFERENT),
    (derive_layer_types_anew, DIFFERENT),
    (put_a_nan, DIFFERENT),
    (lose_a_tensor, r"missing keys in .*model\.layers\.2\.mlp\.down_proj\.weight"),
    (keep_a_removed_layer, r"unexpected keys in .*model\.layers\.4\.mlp\.up_proj\.weight"),
    (keep_the_depth, r"missing keys in .*model\.layers\.4"),
    (forget_a_layer, r"unexpected keys in .*model\.layers\.3"),
    (change_a_shape, LOAD),
    (forget_layer_types, LOAD),
    (truncate, LOAD),
    (lose_the_weights, LOAD),
]
EACH = pytest.mark.parametrize(("sabotage", "message"), SABOTAGES, ids=lambda value: getattr(value, "__name__", ""))


def test_a_right_export_passes(tmp_path: Path) -> None:
    folder, expected = exported(tmp_path)
    assert check(folder, expected) == Verification("float32", 0.0, 0.0, 80, True)


def test_the_expectation_is_that_of_the_tests_own_pass_through(tmp_path: Path) -> None:
    folder, expected = exported(tmp_path)
    assert torch.equal(expected.input_ids, IDS)
    assert torch.equal(expected.logits, logits_of(load_plain(folder), IDS))
    assert not torch.allclose(expected.logits, logits_of(tiny_model(GEMMA), IDS), atol=0.1)


@EACH
def test_an_export_that_is_wrong_fails(sabotage: Sabotage, message: str, tmp_path: Path) -> None:
    folder, expected = exported(tmp_path)
    check(folder, expected)
    sabotage(folder)
    with pytest.raises(VerificationError, match=message):
        check(folder, expected)


@EACH
def test_nothing_is_left_of_an_export_that_is_wrong(
    sabotage: Sabotage, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tiny_model(GEMMA), tmp_path / "source")
    export = pipeline.export_from_files

    def export_and_sabotage(*args: Any) -> None:
        export(*args)
        sabotage(args[2])

    monkeypatch.setattr(pipeline, "export_from_files", export_and_sabotage)
    with pytest.raises(VerificationError, match=message):
        prune(source, tmp_path / "out", plan=PLAN, calibration=plain_set(2, 40))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_was_there_before_survives_an_export_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = exported(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    export = pipeline.export_from_files

    def export_and_sabotage(*args: Any) -> None:
        export(*args)
        flip_one_bit(args[2])

    monkeypatch.setattr(pipeline, "export_from_files", export_and_sabotage)
    with pytest.raises(VerificationError):
        prune(tmp_path / "source", folder, plan=PLAN, calibration=plain_set(2, 40), overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_has_a_tolerance_and_no_generation(dtype: torch.dtype, tmp_path: Path) -> None:
    """One number of the expectation is moved by less, and then by more, than the tolerance."""
    folder, expected = exported(tmp_path, dtype)
    largest = float(expected.logits.abs().max())
    result = check(folder, expected, dtype)
    assert (result.dtype, result.tokens, result.generation) == (str(dtype)[6:], 80, False)
    assert result.tolerance == pytest.approx(HALF_PRECISION_TOLERANCE * largest)
    moved = expected.logits.clone()
    place = divmod(int(moved[0].abs().argmin()), moved.shape[-1])
    moved[0][place] += 0.5 * result.tolerance
    assert check(folder, Expected(IDS, moved), dtype).max_difference == pytest.approx(0.5 * result.tolerance, rel=0.1)
    moved[0][place] += result.tolerance
    with pytest.raises(VerificationError, match="allowed"):
        check(folder, Expected(IDS, moved), dtype)


@pytest.mark.parametrize("sabotage", [swap_layers, derive_layer_types_anew, put_a_nan])
def test_half_precision_still_notices_what_matters(sabotage: Sabotage, tmp_path: Path) -> None:
    folder, expected = exported(tmp_path, torch.bfloat16)
    sabotage(folder)
    with pytest.raises(VerificationError, match=DIFFERENT):
        check(folder, expected, torch.bfloat16)


def test_generation_that_differs_with_the_cache_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of one token, which only generation with the cache makes, goes wrong."""
    folder, expected = exported(tmp_path)
    load = AutoModelForCausalLM.from_pretrained

    def load_and_sabotage(*args: Any, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        model, report = load(*args, **options)
        model.model.layers[1].register_forward_hook(lambda *call: -call[-1] if call[-1].shape[1] == 1 else None)
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_and_sabotage)
    with pytest.raises(VerificationError, match="KV cache"):
        check(folder, expected)
