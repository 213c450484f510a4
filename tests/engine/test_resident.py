"""The pass over a model in memory. Oracles: torch.autograd.grad of transformers' own loss, plain hooks, plain loops."""

from __future__ import annotations

import pytest
import torch
from calibration_sets import ids_and_mask, labels_of, padded_set, plain_set
from layer_states import cka_by_hand, states_around
from tiny_models import Tiny, tiny_model
from transformers import PreTrainedModel

from sglp_llm import analyze
from sglp_llm.calibration import CalibrationSet
from sglp_llm.criteria import Criterion, get_criterion
from sglp_llm.engine import Batch, Need, Observer, PassSettings, run_pass
from sglp_llm.engine.representations import CKAObserver
from sglp_llm.errors import UserError
from sglp_llm.models.loading import DecoderModel, wrap_model

FAMILIES = pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
SETS = pytest.mark.parametrize(
    "calibration", [plain_set(11), padded_set(11, "right"), padded_set(11, "left")], ids=["plain", "right", "left"]
)


def wrapped(family: str) -> DecoderModel:
    return wrap_model(tiny_model(Tiny(family, 0)))


def scores(
    model: DecoderModel, calibration: CalibrationSet, *names: str, batch_size: int = 8
) -> dict[str, list[float]]:
    criteria: dict[str, Criterion] = {name: get_criterion(name)(model.num_layers, 0) for name in names}
    run_pass(model, calibration, list(criteria.values()), PassSettings(batch_size=batch_size))
    return {name: criterion.scores() for name, criterion in criteria.items()}


@FAMILIES
@SETS
def test_gradnorm_is_the_mean_of_the_sequences_gradient_norms(family: str, calibration: CalibrationSet) -> None:
    """Also: the loss that comes back is the mean of transformers' own, and the batch size changes nothing."""
    model = wrapped(family)
    norms, losses = torch.zeros(model.num_layers, dtype=torch.float64), []
    for ids, mask in zip(calibration.input_ids, calibration.mask, strict=True):
        loss = model.model(**ids_and_mask(ids, mask), labels=labels_of(ids, mask), use_cache=False).loss
        losses.append(loss.item())
        parameters = [parameter for layer in model.layers for parameter in layer.parameters()]
        gradients = iter(torch.autograd.grad(loss, parameters))
        for number, layer in enumerate(model.layers):
            squares = [next(gradients).double().square().sum() for _ in layer.parameters()]
            norms[number] += torch.stack(squares).sum().sqrt()
    expected = (norms / len(calibration.input_ids)).tolist()
    for batch_size in (1, 4, 32):
        criterion = get_criterion("gradnorm")(model.num_layers)
        loss_mean = run_pass(model, calibration, [criterion], PassSettings(batch_size=batch_size))
        assert criterion.scores() == pytest.approx(expected, rel=1e-5)
        assert loss_mean == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@FAMILIES
@SETS
def test_similarity_is_the_method_in_a_plain_loop_whatever_the_compute_batch(
    family: str, calibration: CalibrationSet
) -> None:
    """11 sequences in minibatches of 8: the last one has 3. 10 positions do not divide the 24 tokens."""
    model = wrapped(family)
    expected = cka_by_hand(states_around(model, calibration), "cosine", 8, 10)
    for batch_size in (1, 3, 8):
        observer = CKAObserver(model.num_layers, "cosine", 8, 10)
        run_pass(model, calibration, [observer], PassSettings(batch_size=batch_size))
        torch.testing.assert_close(observer.result().values, expected, rtol=1e-4, atol=1e-5)


def test_similarity_with_the_papers_kernel_and_other_minibatches() -> None:
    model, calibration = wrapped("llama"), plain_set(7)
    expected = cka_by_hand(states_around(model, calibration), "linear", 2, 64)
    observer = CKAObserver(model.num_layers, "linear", 2, 64)
    run_pass(model, calibration, [observer], PassSettings(batch_size=5))
    torch.testing.assert_close(observer.result().values, expected, rtol=1e-4, atol=1e-5)


@FAMILIES
@SETS
def test_block_influence_is_a_plain_loop(family: str, calibration: CalibrationSet) -> None:
    model = wrapped(family)
    expected = []
    states = states_around(model, calibration)
    for layer in range(model.num_layers):
        cosines = []
        for sequence in states:
            for before, after in zip(*sequence[layer], strict=True):
                cosines.append(
                    float(before.double() @ after.double() / (before.double().norm() * after.double().norm()))
                )
        expected.append(1 - sum(cosines) / len(cosines))
    for batch_size in (1, 3, 8):
        assert scores(model, calibration, "bi", batch_size=batch_size)["bi"] == pytest.approx(expected, rel=1e-4)


@FAMILIES
def test_magnitude_is_the_sum_of_the_matrices(family: str) -> None:
    model = wrapped(family)
    expected = [
        sum(float(weight.detach().double().abs().sum()) for weight in layer.parameters() if weight.dim() > 1)
        for layer in model.layers
    ]
    assert scores(model, plain_set(1), "magnitude")["magnitude"] == pytest.approx(expected, rel=1e-6)


def test_reverse_and_random() -> None:
    model = wrapped("llama")
    assert scores(model, plain_set(1), "reverse")["reverse"] == [5, 4, 3, 2, 1, 0]
    drawn = [get_criterion("random")(6, seed).scores() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 6
    assert all(0 <= score < 1 for score in drawn[0])


def test_opt_with_layer_drop_is_evaluated_not_trained() -> None:
    """In training mode half of this model's layers would be left out, at random."""
    model = wrapped("opt")
    assert model.model.model.decoder.layerdrop == 0.5
    evaluated = scores(model, plain_set(3), "gradnorm", "bi")
    model.model.train()
    assert scores(model, plain_set(3), "gradnorm", "bi") == evaluated
    assert all(module.training for module in model.model.modules())


def test_what_leaves_the_last_layer_is_before_the_final_norm() -> None:
    model = wrapped("llama")
    shown: list[torch.Tensor] = []

    class Last(Observer):
        needs = Need.HIDDEN_STATES

        def on_layer(self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor) -> None:
            if layer == model.num_layers - 1:
                shown.append(leaving.clone())

    ids = plain_set(2).input_ids
    run_pass(model, plain_set(2), [Last()])
    with torch.no_grad():
        after = model.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(model.model.model.norm(shown[0]), after)
    assert not torch.allclose(shown[0], after, rtol=0.1)


def damage(model: PreTrainedModel, layer: int) -> None:
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight[0, 0] = torch.nan


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_damaged_layer_is_named(layer: int) -> None:
    model = wrapped("llama")
    damage(model.model, layer)
    with pytest.raises(UserError, match=rf"loss is not finite .*decoder layer {layer} is the first"):
        scores(model, plain_set(2), "gradnorm", "bi")


def test_a_damaged_head_is_no_layers_fault() -> None:
    model = wrapped("llama")
    with torch.no_grad():
        model.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"loss is not finite .*every decoder layer's output is"):
        scores(model, plain_set(2), "gradnorm")


@pytest.mark.parametrize("criterion", ["magnitude", "bi"])
def test_a_weight_that_is_not_finite_is_refused_before_it_is_scored(criterion: str) -> None:
    broken = tiny_model(Tiny("llama", 0))
    damage(broken, 2)
    with pytest.raises(UserError, match=r"down_proj\.weight' of decoder layer 2 holds numbers that are not finite"):
        analyze(broken, criterion=criterion, calibration=plain_set(2), drop=1, seq_len=24)
    whole = tiny_model(Tiny("llama", 0))
    assert analyze(whole, criterion=criterion, calibration=plain_set(2), drop=1, seq_len=24).plan.removed
