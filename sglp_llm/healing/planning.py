"""What a training will take, before it begins: memory for both models and a batch, and the steps that a given time allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from transformers import PretrainedConfig

from sglp_llm.errors import UserError
from sglp_llm.healing.loss import divergence, next_token_loss, sampled_positions
from sglp_llm.healing.opening import HealingModels
from sglp_llm.healing.teacher import Teacher, logits_at
from sglp_llm.healing.trained import count_trained, layers_around, seams_of
from sglp_llm.memory.dry_run import dry_run
from sglp_llm.memory.free import free_memory
from sglp_llm.memory.parameter_counts import count_parameters
from sglp_llm.memory.peaks import USABLE
from sglp_llm.models.modes import has_fast_bfloat16
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.processes import Processes

_ADAM_BYTES = 4 + 4 + 4
"""Bytes of a trained parameter beside its value: the gradient and AdamW's two means, in float32."""

_LOGITS = 4
"""Float32 tensors as large as the logits of a batch that exist at once: both models' and two of the divergence."""

_TIMED_STEPS = 2


Train = Literal["seam", "lora", "full"]


def least_batch(recipe: HealingRecipe) -> int:
    """The fewest sequences that a process computes at once."""
    return 1 if recipe.batch_size == "auto" else recipe.batch_size


def in_bfloat16(recipe: HealingRecipe) -> bool:
    """Whether matrices are multiplied in bfloat16."""
    return has_fast_bfloat16() if recipe.dtype == "auto" else recipe.dtype == "bfloat16"


@dataclass(frozen=True)
class Footprint:
    """What a training is predicted to take in memory beside the student's own weights, in bytes.

    Attributes:
        trained: Gradients and optimizer state of the trained parameters.
        sequence: Activations and logits of one sequence.
        teacher: Weights of the teacher; 0 without one.
        free: What there is, measured with the student in memory; ``None`` where the system does not say.
    """

    trained: int
    sequence: int
    teacher: int
    free: int | None

    def fits(self, batch_size: int, with_teacher: bool) -> bool:
        """Whether that many sequences can be computed at once."""
        needed = self.trained + batch_size * self.sequence + (self.teacher if with_teacher else 0)
        return self.free is None or needed <= USABLE * self.free


def footprint(models: HealingModels, recipe: HealingRecipe, trained_parameters: int) -> Footprint:
    """Predicts what training takes, by a dry run of the student.

    Args:
        models: The models; the student is in memory.
        recipe: The settings.
        trained_parameters: Number of trained parameters.
    """
    config = models.student.config
    student = dry_run(config, torch.float32)
    activations = student.training_peak(len(student.layers), recipe.seq_len)
    logits = _LOGITS * 4 * recipe.seq_len * int(models.student.text_config.vocab_size)
    teacher = 0
    if models.teacher is not None:
        stored = getattr(models.teacher.config, "dtype", None) or torch.float32
        teacher = _parameters_of(models.teacher) * stored.itemsize
    free = free_memory()
    there = free.host if free.device is None else free.device
    return Footprint(trained_parameters * _ADAM_BYTES, activations + logits, teacher, there)


def _parameters_of(opened: OpenedModel) -> int:
    dry = dry_run(opened.config, torch.float32)
    return count_parameters(dry.model, dry.layers).total


def with_weights_that_fit(models: HealingModels, recipe: HealingRecipe, processes: Processes) -> HealingModels:
    """The models, whose student is loaded as it is stored where float32 weights are predicted to leave too little room.

    What is trained is float32 in any case (`make_trainable`), and products are bfloat16: the numbers stay the same. It is only
    done for weights that are stored in bfloat16, and with products in bfloat16.

    Args:
        models: The models; the student is not in memory yet.
        recipe: The settings.
        processes: All decide alike.
    """
    student = models.student
    narrow = in_bfloat16(recipe) and getattr(student.config, "dtype", None) == torch.bfloat16
    if narrow:
        beside = footprint(models, recipe, 0)
        weights = 4 * _parameters_of(student)
        narrow = not replace(beside, trained=weights).fits(least_batch(recipe), False)
    if not processes.agreed(int(narrow)):
        return models
    return replace(models, student=student.alike(student.identity.name, "auto"), dtype=torch.bfloat16)


def fitting_train(models: HealingModels, recipe: HealingRecipe) -> Train:
    """What is trained where the recipe leaves it open: the first of full, seam and lora that is predicted to fit.

    Args:
        models: The models; the student is in memory.
        recipe: The settings.
    """
    student = models.student.load()
    # What the teacher does not find room for beside the student is read from disk.
    with_teacher = bool(recipe.on_policy or recipe.hidden_weight)
    possible: list[Train] = ["full"]
    if models.plan is not None and layers_around(seams_of(models.plan), student.num_layers, recipe):
        possible.append("seam")
    if find_spec("peft") is not None:
        possible.append("lora")
    untrained = footprint(models, recipe, 0)
    for train in possible:
        count = count_trained(student, replace(recipe, train=train), models.plan)
        widened = 4 - models.dtype.itemsize if train != "lora" else 0
        if replace(untrained, trained=count * (_ADAM_BYTES + widened)).fits(least_batch(recipe), with_teacher):
            return train
    return possible[-1]


def batch_size_that_fits(predicted: Footprint, most: int, with_teacher: bool) -> int:
    """The largest divisor of ``most`` sequences that can be computed at once, at least 1."""
    sizes = [size for size in range(most, 0, -1) if most % size == 0]
    return next((size for size in sizes if predicted.fits(size, with_teacher)), 1)


def batch_that_runs(attempt: Callable[[int], None], batch_size: int) -> int:
    """The largest divisor of a batch size, itself included, with which something does not run out of memory.

    Args:
        attempt: Called with a batch size.
        batch_size: The largest to try.

    Raises:
        UserError: It runs out of memory with one sequence.
    """
    for size in (size for size in range(batch_size, 0, -1) if batch_size % size == 0):
        try:
            attempt(size)
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            clear_device_cache(garbage_collection=True)
        else:
            return size
    raise UserError(
        "out of memory with one sequence at a time: give --gradient-checkpointing, a smaller --seq-len, or --train lora"
    )


def try_batch(
    model: nn.Module,
    teacher: Teacher | None,
    recipe: HealingRecipe,
    batch_size: int,
    config: PretrainedConfig,
    share: float = 1.0,
) -> None:
    """Computes the loss and its gradients once on random tokens, waits for them and forgets them.

    Args:
        model: The student, its parameters as they will be trained.
        teacher: In memory, or ``None``.
        recipe: The settings.
        batch_size: Sequences computed at once.
        config: The student's.
        share: Of the positions that the loss is computed at. A measurement of the held-out loss, for which there must be memory,
            takes all of them.
    """
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    ids = torch.randint(int(config.vocab_size), (batch_size, recipe.seq_len), generator=generator).to(device)
    positions = sampled_positions(recipe.seq_len, share, recipe.seed)
    positions = None if positions is None else positions.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(recipe)):
        logits = logits_at(model, ids, positions)
    if teacher is None:
        loss = next_token_loss(logits, ids, positions)
    else:
        targets = teacher.targets(torch.zeros(batch_size, dtype=torch.int64), ids, positions)
        loss = divergence(logits, targets, ids, recipe.temperature, recipe.beta, positions)
    loss.backward()
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()


def steps_in(
    seconds: float,
    model: nn.Module,
    teacher: Teacher | None,
    recipe: HealingRecipe,
    batch_size: int,
    config: PretrainedConfig,
) -> int:
    """Optimizer steps that fit into a time, from timing the loss and its gradients on random tokens.

    Args:
        seconds: The time for all steps, and for measuring the held-out loss.
        model: The student, its parameters as they will be trained.
        teacher: In memory, or ``None``.
        recipe: The settings.
        batch_size: Sequences computed at once.
        config: The student's.

    Raises:
        UserError: There is not time enough for one step.
    """
    best = float("inf")
    for _ in range(_TIMED_STEPS):
        start = time.perf_counter()
        try_batch(model, teacher, recipe, batch_size, config, recipe.positions)
        best = min(best, time.perf_counter() - start)
    step = best * recipe.sequences / batch_size
    # The held-out sequences take a third of a step's time for each of theirs, and are measured so many times.
    share = 1 + recipe.held_out * (1 + recipe.evaluations) / 3
    steps = int(seconds / (step * share))
    if steps < 1:
        raise UserError(f"minutes: one step takes about {step:.0f} s, and there are {seconds:.0f} s for all of them")
    return steps
