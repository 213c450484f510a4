"""Trains the student with transformers' Trainer, keeps the best weights on held-out text, and goes on after an interruption."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sglp_llm.calibration.sampling import seed_of
from sglp_llm.calibration.training import TrainingSequences
from sglp_llm.healing.keeping import Keeper, Run, Training, last_checkpoint
from sglp_llm.healing.loss import divergence, hidden_state_loss, next_token_loss, sampled_positions
from sglp_llm.healing.matching import NOTHING_MATCHED, Matched, outputs_of
from sglp_llm.healing.on_policy import continued, is_on_policy, new_tokens
from sglp_llm.healing.remembered import FrozenFront
from sglp_llm.healing.teacher import Teacher, logits_at
from sglp_llm.healing.trained import Trained
from sglp_llm.plan.healing_recipe import HealingRecipe


def rate_factor(recipe: HealingRecipe, step: int, steps: int) -> float:
    """What the peak learning rate is multiplied by at a step, counted from 0: a linear warm-up, then the recipe's schedule."""
    if step < recipe.warmup_steps:
        return (step + 1) / (recipe.warmup_steps + 1)
    done = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    falling = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[recipe.schedule]
    return recipe.final_rate + (1 - recipe.final_rate) * falling


def train(
    trained: Trained,
    teacher: Teacher | None,
    sequences: TrainingSequences,
    held_out: range,
    recipe: HealingRecipe,
    steps: int,
    run: Run,
    matched: Matched = NOTHING_MATCHED,
) -> Training:
    """Minimises a loss on all sequences that are not held out.

    It is ``(1 - hidden_weight) * (alpha * divergence + (1 - alpha) * next-token loss) + hidden_weight * hidden-state loss``.
    In the steps that are on-policy it is that of sequences which the student continues.

    With ``positions`` below 1 the training losses are estimated from as many positions, drawn anew for every step. Measured on
    held-out sequences are all positions.

    Args:
        trained: The student.
        teacher: ``None`` for the next-token loss alone.
        sequences: All sequences.
        held_out: Numbers of those whose loss decides which weights are kept.
        recipe: The settings.
        steps: Optimizer steps.
        run: See `Run`.
        matched: Layers for the hidden-state loss, with a teacher in memory.
    """
    order = _order([number for number in range(len(sequences.input_ids)) if number not in held_out], recipe, steps)
    checkpoint = last_checkpoint(run) if run.resume else None
    run = replace(run, resume=checkpoint is not None)
    trainer = _Distiller(trained, teacher, sequences, held_out, recipe, order, steps, run, matched)
    trainer.keeper.begin()
    with run.progress("Healing", steps * recipe.sequences * sequences.input_ids.shape[1]) as advance:
        trainer.add_callback(_Report(advance, recipe.sequences * sequences.input_ids.shape[1]))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # Otherwise the model would go on computing in bfloat16, and in a wrapper that nobody can save.
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    return trainer.keeper.result(steps)


def _order(numbers: Sequence[int], recipe: HealingRecipe, steps: int) -> list[int]:
    """The training sequences in the order in which they are seen, shuffled anew for every pass over them."""
    generator, order = torch.Generator().manual_seed(recipe.seed), list[int]()
    while len(order) < steps * recipe.sequences:
        order += [numbers[index] for index in torch.randperm(len(numbers), generator=generator).tolist()]
    return order[: steps * recipe.sequences]


class _Examples(Dataset[dict[str, Tensor]]):
    def __init__(self, sequences: TrainingSequences, order: Sequence[int]) -> None:
        self._sequences, self._order = sequences, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = self._order[index]
        return {
            "input_ids": self._sequences.input_ids[number],
            "labels": self._sequences.labels[number],
            "sequence": torch.tensor(number),
        }


class _Distiller(Trainer):
    """transformers' Trainer with the loss of distillation and its own held-out measurement."""

    control: TrainerControl

    def __init__(
        self,
        trained: Trained,
        teacher: Teacher | None,
        sequences: TrainingSequences,
        held_out: range,
        recipe: HealingRecipe,
        order: Sequence[int],
        steps: int,
        run: Run,
        matched: Matched,
    ) -> None:
        self._teacher, self._recipe, self._run, self._matched = teacher, recipe, run, matched
        self._sequences, self._held_out = sequences, held_out
        # In an on-policy step a sequence is not the one that was seen before.
        again = [] if recipe.on_policy else [number for number, count in Counter(order).items() if count > 1]
        again += held_out
        if teacher is not None and not matched.student:  # whose hidden states only a whole run shows
            teacher.remember(again)
        self._front = FrozenFront(trained.front, again)
        self.keeper = Keeper(trained.model, run, recipe.patience, recipe.least_gain)
        self._plain = trained.plain
        every = max(1, steps // recipe.evaluations)
        arguments = TrainingArguments(
            output_dir=str(run.folder),
            per_device_train_batch_size=run.batch_size,
            gradient_accumulation_steps=recipe.sequences // (run.batch_size * run.processes.count),
            max_steps=steps,
            learning_rate=recipe.peak_rate,
            max_grad_norm=recipe.max_grad_norm,
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=every,
            eval_on_start=not run.resume,
            save_strategy="no",  # the Keeper says when
            save_total_limit=1,
            bf16=run.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to=list(run.report_to) or "none",
            seed=recipe.seed,
            # Of hidden states alone the layers behind the last compared one have no gradient.
            ddp_find_unused_parameters=recipe.hidden_weight == 1,
            ddp_backend=None if run.processes.count == 1 else "nccl" if torch.cuda.is_available() else "gloo",
            dataloader_pin_memory=torch.cuda.is_available(),
            log_level="error",
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = (
                1  # a process computes on one device; the Trainer would copy the model to all that it sees
            )
        parameters = [each for each in trained.model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=recipe.peak_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
        )
        schedule = LambdaLR(optimizer, lambda step: rate_factor(recipe, step, steps))
        super().__init__(
            model=trained.model,
            args=arguments,
            train_dataset=_Examples(sequences, order),
            eval_dataset=_Examples(sequences, held_out),
            optimizers=(optimizer, schedule),
            callbacks=[self.keeper],
        )
        self.remove_callback(PrinterCallback)
        # The loss is a mean of its batch: the Trainer is to divide it by the number of batches of a step.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        step = self.state.global_step
        if is_on_policy(self._recipe, step):
            length = new_tokens(self._recipe, step, self.args.max_steps)
            inputs = {**inputs, **continued(self._plain, inputs, self._recipe, step, length)}
        parts = self._losses(model, inputs)
        return (parts["loss"], parts) if return_outputs else parts["loss"]

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The held-out losses, each process measuring its share."""
        share = self._run.processes.share(len(self._held_out))
        mine = self._held_out[share.start : share.stop]
        sums: dict[str, Tensor] = {}
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for first in mine[:: self._run.batch_size]:
                part = slice(first, min(first + self._run.batch_size, mine.stop))
                batch = {
                    "input_ids": self._sequences.input_ids[part],
                    "labels": self._sequences.labels[part],
                    "sequence": torch.arange(part.start, part.stop),
                }
                for name, mean in self._losses(self.model, self._prepare_inputs(batch)).items():
                    known = sums.get(name, torch.zeros((), dtype=torch.float64))
                    sums[name] = known + (part.stop - part.start) * mean.double().cpu()
        self.model.train(was_training)
        names = ["loss", "next_token_loss", *([] if self._teacher is None else ["divergence"])]
        names += ["hidden_state_loss"] if self._matched.student else []
        means = self._run.processes.sum(
            torch.stack([sums.get(name, torch.zeros((), dtype=torch.float64)) for name in names])
        ) / len(self._held_out)
        found = {f"eval_{name}": float(value) for name, value in zip(names, means, strict=True)}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        labels, recipe, ids = inputs["labels"], self._recipe, inputs["input_ids"]
        positions = None
        if model.training:  # the same in all batches of a step
            seed = seed_of(recipe.seed, self.state.global_step)
            positions = sampled_positions(ids.shape[1], recipe.positions, seed)
            positions = None if positions is None else positions.to(ids.device)
        with self._front.of(inputs["sequence"].tolist(), ids.device), outputs_of(self._matched.student) as states:
            logits = logits_at(model, ids, positions)
        if self._teacher is None:
            own = next_token_loss(logits, labels, positions)
            return {"loss": own, "next_token_loss": own.detach()}
        with outputs_of(self._matched.teacher) as wanted:
            targets = self._teacher.targets(inputs["sequence"], ids, positions)
        # Losses over the vocabulary cost as much as some layers: those without weight are for measurements alone.
        measuring, parts = not logits.requires_grad, dict[str, Tensor]()
        others = 1 - recipe.hidden_weight
        weights = {
            "divergence": others * recipe.alpha,
            "next_token_loss": others * (1 - recipe.alpha),
            "hidden_state_loss": recipe.hidden_weight,
        }
        if measuring or weights["divergence"]:
            parts["divergence"] = divergence(logits, targets, labels, recipe.temperature, recipe.beta, positions)
        if measuring or weights["next_token_loss"]:
            parts["next_token_loss"] = next_token_loss(logits, labels, positions)
        if states:
            apart = [hidden_state_loss(*pair, labels) for pair in zip(states, wanted, strict=True)]
            parts["hidden_state_loss"] = torch.stack(apart).mean()
        total = torch.stack([weights[name] * part for name, part in parts.items() if weights[name]]).sum()
        return {"loss": total, **{name: part.detach() for name, part in parts.items()}}


class _Report(TrainerCallback):
    """Advances the progress bar."""

    def __init__(self, advance: Any, tokens: int) -> None:
        self._advance, self._tokens = advance, tokens

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._advance(state.global_step * self._tokens)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._advance(self._tokens)
