"""What a pass costs and what it leaves behind: counted with hooks, compared with what was there before."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from calibration_sets import padded_set, plain_set
from tiny_models import Tiny, tiny_model
from torch import nn

from sglp_llm.calibration import CalibrationSet
from sglp_llm.criteria import Criterion, ScoreCriterion, SetCriterion, criterion_names, get_criterion
from sglp_llm.engine import Batch, Need, Observer, PassSettings, run_pass
from sglp_llm.engine.norms.ghost import Norms
from sglp_llm.engine.representations import CKAObserver
from sglp_llm.errors import UserError
from sglp_llm.models.loading import DecoderModel, wrap_model

FAMILIES = pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])


def wrapped(family: str) -> DecoderModel:
    return wrap_model(tiny_model(Tiny(family, 0)))


def criterion(name: str, model: DecoderModel) -> Criterion:
    return get_criterion(name)(model.num_layers, 0)


def verdict(criterion: Criterion) -> list[float]:
    if isinstance(criterion, SetCriterion):
        return [float(layer) for layer in criterion.choose(3, range(criterion.num_layers))]
    assert isinstance(criterion, ScoreCriterion)
    return criterion.scores()


class Gradients(Observer):
    """Looks at gradients, and fails at the given call where one is given."""

    needs = Need.GRADIENTS

    def __init__(self, model: DecoderModel, fail_at: int | None = None) -> None:
        self.model, self.fail_at = model, fail_at
        self.calls: list[tuple[int, int]] = []  # (sequence, layer)
        self.held: list[set[int]] = []  # the layers that hold a gradient at each call

    def on_gradient(self, layer: int, batch: Batch, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        assert gradient.shape == weight.shape
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((batch.first, layer))
        holding = [number for number, other in enumerate(self.model.layers) if any_gradient(other)]
        inside = {id(parameter) for other in self.model.layers for parameter in other.parameters()}
        outside = [p for p in self.model.model.parameters() if id(p) not in inside and p.grad is not None]
        assert not outside, "embeddings, final norm and head take no gradient"
        self.held.append(set(holding))


def any_gradient(module: nn.Module) -> bool:
    return any(parameter.grad is not None for parameter in module.parameters())


@contextmanager
def counted_calls(model: DecoderModel) -> Iterator[dict[str, int]]:
    """Forward and backward calls of each decoder layer, and forward calls of the head."""
    counts = {"forward": 0, "backward": 0, "head": 0}

    def counter(what: str) -> object:
        def count(*_: object) -> None:
            counts[what] += 1

        return count

    handles = [layer.register_forward_hook(counter("forward")) for layer in model.layers]
    # Called when a parameter has its gradient: once a backward pass through the layer.
    first = [next(layer.parameters()) for layer in model.layers]
    handles += [parameter.register_post_accumulate_grad_hook(counter("backward")) for parameter in first]
    handles += [model.model.get_output_embeddings().register_forward_hook(counter("head"))]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@FAMILIES
def test_all_criteria_in_one_pass_equal_each_alone_and_cost_one_forward_and_one_backward(family: str) -> None:
    model, calibration = wrapped(family), padded_set(5, "right")
    alone = {}
    beside = Need.TRIALS | Need.SYNAPTIC_FLOW  # they run the layers outside the pass over the text
    names = [name for name in criterion_names() if not get_criterion(name).needs & beside]
    for name in names:
        observer = criterion(name, model)
        run_pass(model, calibration, [observer], PassSettings(batch_size=1))
        alone[name] = verdict(observer)
    similarity = CKAObserver(model.num_layers)
    run_pass(model, calibration, [similarity], PassSettings(batch_size=1))
    criteria = {name: criterion(name, model) for name in names}
    both = CKAObserver(model.num_layers)
    with counted_calls(model) as counts:
        run_pass(model, calibration, [*criteria.values(), both])
    calls = 5 * model.num_layers
    assert counts == {"forward": calls, "backward": calls, "head": 5}
    for name, observer in criteria.items():
        assert verdict(observer) == pytest.approx(alone[name]), name
    torch.testing.assert_close(both.result().values, similarity.result().values)


@pytest.mark.parametrize(
    ("names", "batch_size", "forward"),
    [(["bi"], 2, 3), (["bi", "magnitude"], 8, 1), (["magnitude", "reverse", "random"], 2, 0)],
)
def test_without_gradients_batches_are_used_and_the_head_rests(names: list[str], batch_size: int, forward: int) -> None:
    model = wrapped("llama")
    with counted_calls(model) as counts:
        observers = [criterion(name, model) for name in names]
        assert run_pass(model, plain_set(5), observers, PassSettings(batch_size=batch_size)) is None
    assert counts == {"forward": forward * model.num_layers, "backward": 0, "head": 0}


@FAMILIES
def test_one_layers_gradients_are_alive_at_a_time(family: str) -> None:
    model = wrapped(family)
    observer = Gradients(model)
    run_pass(model, plain_set(2), [observer])
    parameters = [
        (sequence, layer)
        for layer in range(model.num_layers)
        for _ in model.layers[layer].parameters()
        for sequence in (0, 1)
    ]
    assert sorted(observer.calls) == sorted(parameters)
    assert all(held == {layer} for held, (_, layer) in zip(observer.held, observer.calls, strict=True))
    layers = [layer for sequence, layer in observer.calls if sequence == 0]
    assert layers == sorted(layers, reverse=True), "from the last layer to the first, none twice"


def leftovers(model: DecoderModel) -> list[tuple[object, ...]]:
    """Everything that a pass might leave behind in the model."""
    parameters = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.model.parameters()]
    hooks = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for module in model.model.modules()
    ]
    return [*parameters, *hooks]


def assert_same(before: list[tuple[object, ...]], after: list[tuple[object, ...]]) -> None:
    for old, new in zip(before, after, strict=True):
        for one, other in zip(old, new, strict=True):
            if isinstance(one, torch.Tensor):
                assert isinstance(other, torch.Tensor)
                assert torch.equal(one, other)
            else:
                assert other == one, (old, new)


def used_model(family: str) -> DecoderModel:
    """A model in the middle of somebody's training: mixed modes, frozen parts, gradients that wait for the optimiser."""
    model = wrapped(family)
    model.model.train()
    model.layers[1].eval()
    model.layers[2].requires_grad_(False)
    for parameter in [*model.layers[3].parameters(), *model.model.get_input_embeddings().parameters()]:
        parameter.grad = torch.full_like(parameter, 7.0)
    return model


@FAMILIES
@pytest.mark.parametrize("fail_at", [None, 0, 10])
def test_the_model_is_left_as_it_was(family: str, fail_at: int | None) -> None:
    model = used_model(family)
    before = leftovers(model)
    observers = [Gradients(model, fail_at), criterion("bi", model)]
    if fail_at is None:
        run_pass(model, plain_set(2), observers)
    else:
        with pytest.raises(KeyboardInterrupt):
            run_pass(model, plain_set(2), observers)
    assert_same(before, leftovers(model))


@FAMILIES
@pytest.mark.parametrize("norms", ["ghost", "direct", "autograd"])
def test_the_model_is_left_as_it_was_when_norms_are_taken(family: str, norms: Norms) -> None:
    model = used_model(family)
    before = leftovers(model)
    run_pass(model, plain_set(2), [criterion("gradnorm", model)], PassSettings(norms=norms))
    assert_same(before, leftovers(model))


def test_the_model_is_left_as_it_was_when_the_loss_is_not_finite() -> None:
    model = used_model("llama")
    before = leftovers(model)
    with torch.no_grad():
        next(model.layers[4].parameters()).fill_(torch.inf)
    with pytest.raises(UserError, match="not finite"):
        run_pass(model, plain_set(2), [criterion("gradnorm", model), criterion("bi", model)])
    assert_same(before, leftovers(model))


def test_gradients_that_were_there_before_do_not_count() -> None:
    fresh, used = criterion("gradnorm", wrapped("llama")), criterion("gradnorm", wrapped("llama"))
    run_pass(wrapped("llama"), plain_set(3), [fresh])
    run_pass(used_model("llama"), plain_set(3), [used])
    assert used.scores() == fresh.scores()


def test_scores_can_be_taken_inside_no_grad() -> None:
    model = wrapped("llama")
    outside, inside = criterion("gradnorm", model), criterion("gradnorm", model)
    run_pass(model, plain_set(2), [outside])
    with torch.no_grad():
        run_pass(model, plain_set(2), [inside])
    assert inside.scores() == outside.scores()


class LiveTensors(Observer):
    """The bytes of all tensors that are alive after every eighth sequence."""

    needs = Need.HIDDEN_STATES

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_batch_end(self, batch: Batch) -> None:
        if batch.first % 8 != 7:
            return
        gc.collect()
        tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
        self.bytes.append(sum(tensor.nbytes for tensor in tensors))


def test_memory_does_not_grow_with_the_calibration_set() -> None:
    """After 8, 16, 24 and 32 sequences exactly as many bytes are held: the CKA minibatch of 8 is full, and gone."""
    model = wrapped("llama")
    calibration: CalibrationSet = plain_set(32)
    live = LiveTensors()
    observers = [criterion("gradnorm", model), criterion("bi", model), CKAObserver(model.num_layers), live]
    run_pass(model, calibration, observers, PassSettings(batch_size=1))
    assert len(live.bytes) == 4
    assert len(set(live.bytes)) == 1, live.bytes


def test_progress_is_told_every_sequence_once() -> None:
    told: list[tuple[str, int]] = []

    @contextmanager
    def progress(what: str, total: int) -> Iterator[object]:
        told.append((what, total))
        yield lambda step: told.append(("step", step))

    model = wrapped("llama")
    run_pass(model, plain_set(5), [criterion("bi", model)], PassSettings(batch_size=2, progress=progress))
    assert told[0][1] == 5
    assert [step for _, step in told[1:]] == [2, 2, 1]
