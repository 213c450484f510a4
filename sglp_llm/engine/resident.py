"""The engine for a model that is entirely in memory, on one device or spread over several by accelerate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sglp_llm.calibration import CalibrationSet
from sglp_llm.engine.gradients import end_gradients, sequences_a_step, watched_gradients
from sglp_llm.engine.loss import not_finite, sequence_loss
from sglp_llm.engine.modes import entering_states, leaving_states
from sglp_llm.engine.observer import Batch, Need, Observer
from sglp_llm.engine.settings import DEFAULTS, PassSettings
from sglp_llm.errors import UserError
from sglp_llm.models.loading import DecoderModel
from sglp_llm.models.modes import evaluating


def run_pass(
    model: DecoderModel,
    calibration: CalibrationSet,
    observers: Sequence[Observer],
    settings: PassSettings = DEFAULTS,
) -> float | None:
    """Gives the observers what they need: one forward pass, and one backward pass if gradients are needed.

    A step is a batch, or one sequence where gradients need it (`sequences_a_step`). A decoder layer's gradients are passed on and
    freed as soon as autograd has computed them; embeddings, final norm and head get no gradient. Without gradients the head does
    not run. If no observer needs hidden states or gradients, nothing runs. Each process takes its share of the sequences.

    Returns:
        The mean loss of the calibration sequences in nats per token if there was a backward pass, otherwise ``None``.

    Raises:
        UserError: The loss is not finite (the message names the first layer whose output is not), or a part of the model is
            offloaded although gradients are needed.
    """
    needs = Need.NOTHING
    for observer in observers:
        needs |= observer.needs
    if Need.WEIGHTS in needs:
        for index, layer in enumerate(model.layers):
            show_weights(index, layer, observers)
    differentiate = bool(needs & Need.BACKWARD)
    loss = None
    if differentiate or Need.HIDDEN_STATES in needs:
        if differentiate:
            _refuse_offloaded(model)
            size = sequences_a_step(model, needs, settings, calibration.input_ids.shape[1])
            settings = replace(settings, batch_size=size)
        loss_sum = _run(model, calibration, observers, needs, settings)
        if differentiate:
            total = settings.processes.sum(torch.tensor(loss_sum, dtype=torch.float64))
            loss = float(total) / len(calibration.input_ids)
            for index, layer in enumerate(model.layers):
                end_gradients(index, layer, observers, settings.processes)
    for observer in observers:
        observer.on_pass_end(settings.processes)
    return loss


def _run(
    model: DecoderModel,
    calibration: CalibrationSet,
    observers: Sequence[Observer],
    needs: Need,
    settings: PassSettings,
) -> float:
    """Runs this process's share of the sequences; returns the sum of their losses, 0 without a backward pass."""
    differentiate = bool(needs & Need.BACKWARD)
    together = math.lcm(*(observer.together for observer in observers))
    share = settings.processes.share(len(calibration.input_ids), together)
    watching = [observer for observer in observers if Need.HIDDEN_STATES in observer.needs]
    current: list[Batch] = []  # the current batch, which the hooks read
    loss_sum = 0.0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model.model))
        if watching:
            stack.enter_context(_layer_hooks(model.layers, watching, current))
        if Need.STATE_GRADIENTS in needs:
            stack.enter_context(_state_gradient_hooks(model.layers, observers, current))
        if differentiate:
            stack.enter_context(frozen(model.model))
            layers, batched = dict(enumerate(model.layers)), settings.batch_size > 1
            stack.enter_context(watched_gradients(layers, observers, current, settings.norms, batched))
        stack.enter_context(torch.enable_grad() if differentiate else torch.inference_mode())
        advance = stack.enter_context(settings.progress("Analysing", len(share)))
        for batch, ids, mask in batches(calibration, settings.batch_size, model.input_device, share):
            current[:] = [batch]
            if differentiate:
                logits = model.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                losses = sequence_loss(logits, ids, mask)
                values = losses.tolist()  # the one wait for the device in a step
                for index, value in enumerate(values):
                    if not math.isfinite(value):
                        one = slice(index, index + 1)
                        own_mask = None if mask is None else mask[one]
                        raise _not_finite(model, batch.first + index, value, ids[one], own_mask)
                loss_sum += sum(values)
                del logits  # tokens x vocabulary: freed before the backward pass needs memory
                losses.sum().backward()
                del losses
            else:
                model.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            for observer in watching:
                observer.on_batch_end(batch)
            advance(batch.size)
    return loss_sum


def batches(
    calibration: CalibrationSet, batch_size: int, device: torch.device, share: range | None = None
) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor | None]]:
    """The calibration set in batches: the `Batch`, its ids ``[batch, tokens]`` and its mask, ``None`` without padding."""
    share = range(len(calibration.input_ids)) if share is None else share
    for first in share[::batch_size]:
        end = min(first + batch_size, share.stop)
        ids, mask = calibration.input_ids[first:end].to(device, non_blocking=True), calibration.mask[first:end]
        # Without a mask transformers uses its fast causal attention.
        batch = Batch(first, len(ids), None if mask.all() else mask)
        yield batch, ids, batch.mask_on(device)


def show_weights(index: int, layer: nn.Module, observers: Sequence[Observer]) -> None:
    """Passes a decoder layer's parameters to the observers that need weights.

    Raises:
        UserError: accelerate keeps the layer out of memory.
    """
    watching = [observer for observer in observers if Need.WEIGHTS in observer.needs]
    if watching:
        check_in_memory(index, layer)
    for weight in layer.parameters() if watching else ():
        for observer in watching:
            observer.on_weight(index, weight.detach())


def check_in_memory(index: int, layer: nn.Module) -> None:
    """Refuses to look at weights that are not in memory.

    Raises:
        UserError: accelerate keeps a weight of the decoder layer out of memory.
    """
    if any(weight.is_meta for weight in layer.parameters()):
        raise UserError(
            f"decoder layer {index} was offloaded, and its weights are to be looked at: use --engine streamed, "
            "or a larger machine"
        )


@contextmanager
def _layer_hooks(layers: nn.ModuleList, watching: Sequence[Observer], current: list[Batch]) -> Iterator[None]:
    def hook_for(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            leaving = leaving_states(output).detach()
            # accelerate moves the arguments to the layer's device behind the hooks.
            entering = entering_states(args, kwargs).detach().to(leaving.device)
            with torch.no_grad():
                for observer in watching:
                    observer.on_layer(index, current[0], entering, leaving)

        return hook

    handles = [layer.register_forward_hook(hook_for(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _state_gradient_hooks(layers: nn.ModuleList, observers: Sequence[Observer], current: list[Batch]) -> Iterator[None]:
    watching = [observer for observer in observers if Need.STATE_GRADIENTS in observer.needs]

    def require_gradient(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering_states(args, kwargs).requires_grad_(True)

    def hook_for(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            leaving = leaving_states(output)
            # Detached, because the graph holds the hook: a hook that held the graph would be a cycle that is never freed.
            around = entering_states(args, kwargs).detach().to(leaving.device), leaving.detach()

            def arrived(gradient: torch.Tensor) -> None:
                for observer in watching:
                    observer.on_state_gradient(index, current[0], *around, gradient)

            leaving.register_hook(arrived)

        return hook

    handles = [layer.register_forward_hook(hook_for(index), with_kwargs=True) for index, layer in enumerate(layers)]
    # The embeddings have no gradient, and maybe no parameter has one: then the states would not require one either.
    handles.append(layers[0].register_forward_pre_hook(require_gradient, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block no parameter requires a gradient or has one; both are restored afterwards."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _refuse_offloaded(model: DecoderModel) -> None:
    if any(parameter.device.type == "meta" for parameter in model.model.parameters()):
        raise UserError(
            "the model does not fit: a part of it was offloaded, and gradients need every layer on a device; "
            "use a larger machine, --dtype bfloat16, or a criterion without gradients (bi)"
        )


def _not_finite(
    model: DecoderModel, sequence: int, loss: float, ids: torch.Tensor, mask: torch.Tensor | None
) -> UserError:
    """The error for a loss that is not finite; another forward pass finds the first layer whose output is not."""
    broken: list[int] = []

    class Finder(Observer):
        def on_layer(self, layer: int, batch: Batch, entering: torch.Tensor, leaving: torch.Tensor) -> None:
            if not broken and not torch.isfinite(leaving).all():
                broken.append(layer)

    with _layer_hooks(model.layers, [Finder()], [Batch(sequence, 1, None)]), torch.no_grad():
        model.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return not_finite(loss, sequence, broken[0] if broken else None)
