"""Norms of linears' gradients without the gradients. Oracles: the gradient formed in float64, and plain autograd."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from calibration_sets import padded_set, plain_set
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Tiny, every_tiny, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from sglp_llm.calibration import CalibrationSet
from sglp_llm.engine import Batch, Need, Observer, PassSettings, run_pass
from sglp_llm.engine.gradients import watched_gradients
from sglp_llm.engine.norms.ghost import Norms, ghost_is_cheaper, linear_squared_norm
from sglp_llm.engine.norms.vectors import sequences_are_separable
from sglp_llm.models.loading import DecoderModel, wrap_model

WITHOUT_GRADIENTS: list[Norms] = ["ghost", "direct", "auto"]
EITHER = pytest.mark.parametrize("norms", WITHOUT_GRADIENTS)


class Squares(Observer):
    """Sums what it is told, by sequence and layer; wants no whole gradients."""

    needs = Need.GRADIENT_NORMS

    def __init__(self) -> None:
        self.sums: dict[tuple[int, int], float] = defaultdict(float)
        self.names: set[str] = set()

    def on_gradient_norm(self, layer: int, batch: Batch, name: str, squared: torch.Tensor) -> None:
        assert squared.dtype == torch.float64
        assert squared.shape == (batch.size,)
        for index, each in enumerate(squared.tolist()):
            self.sums[batch.first + index, layer] += each
        self.names.add(name)


def squares(
    model: DecoderModel, calibration: CalibrationSet, norms: Norms, batch_size: int = 1
) -> dict[tuple[int, int], float]:
    observer = Squares()
    run_pass(model, calibration, [observer], PassSettings(batch_size, norms=norms))
    return dict(observer.sums)


def formed(inputs: torch.Tensor, gradients: list[torch.Tensor]) -> float:
    return sum(float((gradient.double().T @ inputs.double()).square().sum()) for gradient in gradients)


def squared_norm(inputs: torch.Tensor, gradients: list[torch.Tensor], norms: Norms) -> float:
    return float(linear_squared_norm(inputs[None], [gradient[None] for gradient in gradients], norms))


def random_matrix(rows: int, columns: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@EITHER
@given(
    tokens=st.integers(1, 300),
    width_in=st.integers(1, 40),
    widths_out=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_is_the_norm_of_the_formed_gradient(
    norms: Norms, tokens: int, width_in: int, widths_out: list[int], scale: float, dtype: torch.dtype
) -> None:
    """Tokens below, at and above the block of 128; gradients as small as those of a mean over many tokens."""
    inputs = random_matrix(tokens, width_in, 0, scale).to(dtype)
    gradients = [random_matrix(tokens, width, number + 1, 1e-6).to(dtype) for number, width in enumerate(widths_out)]
    assert squared_norm(inputs, gradients, norms) == pytest.approx(formed(inputs, gradients), rel=1e-5)


@EITHER
@pytest.mark.parametrize("massive", [0, 130, 299])
def test_one_massive_token_among_ordinary_ones(norms: Norms, massive: int) -> None:
    inputs, gradient = random_matrix(300, 24, 0), random_matrix(300, 40, 1)
    inputs[massive] *= 1000
    gradient[massive] /= 1000  # as attention sinks do, or the others would not count
    assert squared_norm(inputs, [gradient], norms) == pytest.approx(formed(inputs, [gradient]), rel=1e-5)


@EITHER
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_rounds_sums(norms: Norms, dtype: torch.dtype) -> None:
    """A product of two of these inputs is above 65504, float16's largest number."""
    inputs, gradient = random_matrix(200, 64, 0, 3e3).to(dtype), random_matrix(200, 48, 1, 3e2).to(dtype)
    assert squared_norm(inputs, [gradient], norms) == pytest.approx(formed(inputs, [gradient]), rel=1e-5)


@EITHER
@pytest.mark.parametrize(("scale", "others"), [(1e25, 0.0), (1e25, 1e-22), (1e-3, 1e25)], ids=["zero", "tiny", "huge"])
def test_squares_beyond_float32_of_a_gradient_within_it(norms: Norms, scale: float, others: float) -> None:
    """One token's input is huge, and its output has no gradient, or a tiny one; or the gradient is huge."""
    inputs, gradient = random_matrix(300, 24, 0), random_matrix(300, 40, 1)
    inputs[130] *= scale
    gradient[130] *= others
    assert squared_norm(inputs, [gradient], norms) == pytest.approx(formed(inputs, [gradient]), rel=1e-5)


@EITHER
@pytest.mark.parametrize("seed", range(8))
def test_a_gradient_of_zero_has_no_negative_norm(norms: Norms, seed: int) -> None:
    """Equal tokens whose gradients cancel: rounding leaves anything around 0, below it in half of the cases."""
    inputs, gradient = random_matrix(1, 64, seed).expand(51, 64), random_matrix(50, 64, seed + 100)
    gradient = torch.cat([gradient, -gradient.sum(dim=0, keepdim=True)])
    largest = float(inputs.square().sum() * gradient.square().sum())
    assert 0 <= squared_norm(inputs, [gradient], norms) <= 1e-7 * largest


def test_grams_are_taken_where_tokens_are_few_for_the_widths() -> None:
    assert ghost_is_cheaper(512, 2048, [2048, 2048, 2048], 128)
    assert ghost_is_cheaper(128, 576, [576], 128)
    assert not ghost_is_cheaper(2048, 576, [576], 128)
    assert not ghost_is_cheaper(1, 1, [1], 128)


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_every_family_has_the_norms_of_autograd(tiny: Tiny) -> None:
    model, calibration = wrap_model(tiny_model(tiny)), padded_set(2, "left")
    expected = squares(model, calibration, "autograd")
    assert len(expected) == 2 * model.num_layers
    for norms in WITHOUT_GRADIENTS:
        assert squares(model, calibration, norms) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tiny", every_tiny(), ids=str)
def test_every_sequence_of_a_batch_has_the_norms_that_it_has_alone(tiny: Tiny) -> None:
    """Three sequences of which two are padded; mixtures of experts, which cannot be told apart, included."""
    model, calibration = wrap_model(tiny_model(tiny)), padded_set(3, "left")
    expected = squares(model, calibration, "auto")
    assert squares(model, calibration, "auto", 3) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("norms", [*WITHOUT_GRADIENTS, "autograd"])
def test_a_finite_model_whose_gram_matrices_overflow_is_scored(norms: Norms) -> None:
    """The value weights of one layer are huge and its output weights tiny: its outputs stay the same."""
    plain, scaled = (wrap_model(tiny_model(Tiny("llama", 0))) for _ in range(2))
    factor = 2.0**66
    with torch.no_grad():
        scaled.layers[1].self_attn.v_proj.weight.mul_(factor)
        scaled.layers[1].self_attn.o_proj.weight.div_(factor)
    expected, told = true_squares(plain), true_squares(scaled)
    assert told[0] == pytest.approx(expected[0])
    assert told[1] > 1e30
    found = squares(scaled, plain_set(1), norms)
    assert [found[0, layer] for layer in range(scaled.num_layers)] == pytest.approx(told, rel=1e-4)


def true_squares(model: DecoderModel) -> list[float]:
    """Of each layer's gradient on one sequence, by autograd, summed in float64."""
    ids = plain_set(1).input_ids
    model.model(input_ids=ids, labels=ids).loss.backward()
    return [sum(float(each.grad.double().square().sum()) for each in layer.parameters()) for layer in model.layers]


def test_families_whose_sequences_are_told_apart() -> None:
    """All but those with stacked experts or other parameters that neither a linear nor a norm holds."""
    known = {tiny: sequences_are_separable(wrap_model(tiny_model(tiny)).layers) for tiny in every_tiny()}
    plain = [tiny for tiny in known if tiny.adapter.active_experts_key is None]
    assert [str(tiny) for tiny in plain if not known[tiny]] == []


def test_every_linear_of_a_llama_is_watched_and_four_groups_are_reported() -> None:
    observer = Squares()
    run_pass(wrap_model(tiny_model(Tiny("llama", 0))), plain_set(1), [observer], PassSettings(norms="ghost"))
    assert sum("proj" in name for name in observer.names) == 4
    assert sum("norm" in name for name in observer.names) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
@EITHER
def test_no_linear_has_a_weight_gradient_at_any_time(family: str, norms: Norms) -> None:
    """Autograd saves no input for a weight that takes no gradient, and accumulates nothing into it."""
    model = wrap_model(tiny_model(Tiny(family, 0)))
    linears = [module for module in model.layers.modules() if type(module) in (nn.Linear, Conv1D)]
    assert linears
    looked: list[int] = []

    class Looks(Squares):
        def on_gradient_norm(self, layer: int, batch: Batch, name: str, squared: torch.Tensor) -> None:
            assert not any(linear.weight.requires_grad or linear.weight.grad is not None for linear in linears)
            looked.append(layer)

    run_pass(model, plain_set(2), [Looks()], PassSettings(norms=norms))
    assert set(looked) == set(range(model.num_layers))


def test_whole_gradients_are_still_shown_and_norms_are_taken_from_them() -> None:
    class Whole(Observer):
        needs = Need.GRADIENTS

        def __init__(self) -> None:
            self.sums: dict[tuple[int, int], float] = defaultdict(float)

        def on_gradient(
            self, layer: int, batch: Batch, name: str, weight: torch.Tensor, gradient: torch.Tensor
        ) -> None:
            self.sums[batch.first, layer] += float(gradient.double().square().sum())

    model, whole, norms = wrap_model(tiny_model(Tiny("llama", 0))), Whole(), Squares()
    run_pass(model, plain_set(2), [whole, norms], PassSettings(norms="ghost"))
    assert norms.sums == pytest.approx(whole.sums, rel=1e-5)
    assert squares(model, plain_set(2), "ghost") == pytest.approx(whole.sums, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_is_near_float32(family: str) -> None:
    """Activations and gradients are rounded to 8 bits on the way, whoever takes the norm."""
    calibration = plain_set(2)
    exact = squares(wrap_model(tiny_model(Tiny(family, 0))), calibration, "autograd")
    half = wrap_model(tiny_model(Tiny(family, 0)).bfloat16())
    rounded = squares(half, calibration, "autograd")
    for norms in WITHOUT_GRADIENTS:
        assert squares(half, calibration, norms) == pytest.approx(rounded, rel=0.01)
        assert squares(half, calibration, norms) == pytest.approx(exact, rel=0.15)


class Odd(nn.Module):
    """What decoder layers do not do yet: nothing trainable before a linear, a weight that runs twice, results not used."""

    def __init__(self, repeat_inputs: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.unused, self.idle = nn.Linear(6, 5, bias=False), nn.Linear(6, 6)
        self.keyword = nn.Linear(6, 6)
        self.transposed = Conv1D(4, 6)
        self.repeat_inputs = repeat_inputs

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        one = torch.tanh(self.first(states))
        other = self.keyword(input=one)
        two = self.twice(states)
        self.unused(states)
        again = self.twice(states if self.repeat_inputs else one) * two
        return self.transposed(again) + self.transposed(other).flip(1)


def told_of(layer: nn.Module, states: list[torch.Tensor], norms: Norms) -> dict[tuple[int, int], float]:
    observer, current = Squares(), list[Batch]()
    with watched_gradients({3: layer}, [observer], current, norms):
        for number, entering in enumerate(states):
            current[:] = [Batch(number, 1, None)]
            layer(entering).square().mean().backward()
    return dict(observer.sums)


@EITHER
@pytest.mark.parametrize("repeat_inputs", [True, False])
def test_linears_used_in_unusual_ways(norms: Norms, repeat_inputs: bool) -> None:
    layer = Odd(repeat_inputs)
    states = [random_matrix(7, 6, seed)[None] for seed in range(3)]
    expected = {}
    for number, entering in enumerate(states):
        parameters = list(layer.parameters())
        gradients = torch.autograd.grad(layer(entering).square().mean(), parameters, allow_unused=True)
        expected[number, 3] = sum(float(each.double().square().sum()) for each in gradients if each is not None)
    assert told_of(layer, states, norms) == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in layer.parameters())


def test_a_forward_pass_without_its_backward_pass_shows_nothing() -> None:
    layer, observer, current = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), Squares(), [Batch(0, 1, None)]
    states = random_matrix(7, 6, 0)
    with watched_gradients({0: layer}, [observer], current, "ghost"):
        with torch.no_grad():
            layer(states)
        layer(states)
    layer(states).sum().backward()
    assert not observer.sums
    assert all(parameter.grad is not None for parameter in layer.parameters())


@contextmanager
def saved_tensors() -> Iterator[list[torch.Size]]:
    """The shapes of what autograd keeps for the backward pass."""
    shapes: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> Any:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        yield shapes


def test_autograd_keeps_no_input_of_a_linear() -> None:
    """Only its weight, which is there anyway."""
    layer, current = nn.Linear(6, 4, bias=False), [Batch(0, 1, None)]
    states = random_matrix(7, 6, 0).requires_grad_()
    for norms, kept in (("autograd", True), ("ghost", False)):
        with watched_gradients({0: layer}, [Squares()], current, norms), saved_tensors() as shapes:
            layer(states).sum().backward()
        assert ((7, 6) in shapes) is kept
