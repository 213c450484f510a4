"""Training against a plain loop with torch's AdamW; interrupted and resumed; shared by processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from many_processes import in_processes
from tiny_models import Tiny, tiny_model
from torch import nn

from sglp_llm import current_processes, drop_layers
from sglp_llm.calibration.training import TrainingSequences
from sglp_llm.healing.keeping import LOG_FILE_NAME, Run, Training
from sglp_llm.healing.loss import IGNORED
from sglp_llm.healing.teacher import OnlineTeacher
from sglp_llm.healing.trained import make_trainable
from sglp_llm.healing.training import rate_factor, train
from sglp_llm.models.loading import wrap_model
from sglp_llm.plan import plan_from_indices
from sglp_llm.plan.healing_recipe import HealingRecipe
from sglp_llm.progress import Advance, Progress, silent
from sglp_llm.tensor_files.tensors import read_tensors

PLAN = plan_from_indices(6, (2, 3))
RECIPE = HealingRecipe(
    train="full", learning_rate=3e-3, sequences=4, warmup_steps=1, evaluations=6, weight_decay=0.1, final_rate=0.1
)
STEPS = 6
HELD_OUT = range(7, 10)


def sequences() -> TrainingSequences:
    """Ten that the original has written itself; of the third only the second half is to be predicted."""
    model = tiny_model(Tiny("llama", 0))
    ids = torch.randint(3, 300, (10, 1), generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        while ids.shape[1] < 16:
            chances = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(dim=-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    labels = ids.clone()
    labels[2, :8] = IGNORED
    return TrainingSequences(ids, labels, "by itself", torch.zeros(len(ids)), "by itself")


def trained_by_us(
    folder: Path, recipe: HealingRecipe = RECIPE, alone: bool = False, **run: Any
) -> tuple[Training, nn.Module]:
    folder.mkdir(exist_ok=True)
    student = wrap_model(drop_layers(tiny_model(Tiny("llama", 0)), PLAN))
    teacher = None if alone else OnlineTeacher(wrap_model(tiny_model(Tiny("llama", 0))))
    ready = make_trainable(student, recipe, PLAN)
    options = {"batch_size": 2, **run}
    return train(ready, teacher, sequences(), HELD_OUT, recipe, STEPS, Run(folder, **options)), student.model


def loss_by_hand(
    student: nn.Module, teacher: nn.Module | None, ids: torch.Tensor, labels: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Of one sequence."""
    own = student(input_ids=ids[None], use_cache=False).logits[0, :-1]
    counted = labels[1:] != IGNORED
    nll = nn.functional.cross_entropy(own[counted], labels[1:][counted])
    if teacher is None:
        return nll
    with torch.no_grad():
        other = teacher(input_ids=ids[None], use_cache=False).logits[0, :-1][counted]
    pairs = own[counted].log_softmax(-1), other.log_softmax(-1)
    return alpha * nn.functional.kl_div(*pairs, log_target=True, reduction="batchmean") + (1 - alpha) * nll


@pytest.mark.parametrize(("alpha", "alone"), [(1.0, False), (0.3, False), (1.0, True)])
def test_it_is_a_plain_loop(alpha: float, alone: bool, tmp_path: Path) -> None:
    recipe = RECIPE.with_changes(alpha=alpha)
    found, model = trained_by_us(tmp_path / "run", recipe, alone)
    student = drop_layers(tiny_model(Tiny("llama", 0)), PLAN)
    teacher = None if alone else tiny_model(Tiny("llama", 0))
    text, order = sequences(), torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    queue: list[int] = []
    measured, losses, states = [], [], []

    def held_out() -> float:
        with torch.no_grad():
            each = [loss_by_hand(student, teacher, text.input_ids[n], text.labels[n], alpha) for n in HELD_OUT]
        return float(sum(each)) / len(each)

    measured.append(held_out())
    for step in range(STEPS):
        while len(queue) < 4:
            queue += torch.randperm(7, generator=order).tolist()
        chosen, queue = queue[:4], queue[4:]
        optimizer.zero_grad()
        each = [loss_by_hand(student, teacher, text.input_ids[n], text.labels[n], alpha) for n in chosen]
        (sum(each) / 4).backward()
        losses.append(float(sum(each).detach()) / 4)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 3e-3 * rate_factor(recipe, step, STEPS)
        optimizer.step()
        measured.append(held_out())
        states.append({name: value.clone() for name, value in student.state_dict().items()})
    assert [line["loss"] for line in found.log if "loss" in line] == pytest.approx(losses, rel=1e-3)
    assert [line["eval_loss"] for line in found.log if "eval_loss" in line] == pytest.approx(measured, rel=1e-3)
    assert found.best_step == measured.index(min(measured)) > 0
    assert (found.before["loss"], found.after["loss"]) == pytest.approx((measured[0], min(measured)), rel=1e-3)
    assert ("divergence" in found.before) == (not alone)
    for name, value in states[found.best_step - 1].items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_the_rate_rises_and_falls() -> None:
    recipe = HealingRecipe(warmup_steps=2, final_rate=0.1, schedule="linear")
    assert [rate_factor(recipe, step, 12) for step in (0, 1, 2, 7, 12)] == pytest.approx([1 / 3, 2 / 3, 1, 0.55, 0.1])
    cosine = HealingRecipe(warmup_steps=0)
    assert [rate_factor(cosine, step, 10) for step in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    assert rate_factor(HealingRecipe(schedule="constant", warmup_steps=0), 9, 10) == 1


class Killed(Exception):
    pass


def killed_after(tokens: int) -> Progress:
    """A progress that ends the run."""

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Advance]:
        done = 0

        def advance(units: int) -> None:
            nonlocal done
            done += units
            if done >= tokens:
                raise Killed

        yield advance

    return progress


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("steps", [1, 4])
def test_resumed_it_ends_like_uninterrupted(kind: str, steps: int, tmp_path: Path) -> None:
    recipe = RECIPE.with_changes(train=kind, lora_rank=2, evaluations=3, positions=0.5)
    whole, model = trained_by_us(tmp_path / "whole", recipe)
    with pytest.raises(Killed):
        trained_by_us(tmp_path / "cut", recipe, progress=killed_after(steps * 4 * 16))
    rest, other = trained_by_us(tmp_path / "cut", recipe, resume=True)
    without_time = [[{k: v for k, v in line.items() if k != "seconds"} for line in each.log] for each in (whole, rest)]
    assert without_time[0] == without_time[1]
    assert (whole.before, whole.after, whole.best_step) == (rest.before, rest.after, rest.best_step)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    lines = (tmp_path / "cut" / LOG_FILE_NAME).read_text().splitlines()
    assert len([line for line in map(json.loads, lines) if "loss" in line]) == STEPS


def test_it_goes_on_from_a_checkpoint_before_the_last_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglp_llm.healing.keeping.CHECKPOINT_SHARE", 0.0)  # the first one alone
    recipe = RECIPE.with_changes(evaluations=6)
    whole, model = trained_by_us(tmp_path / "whole", recipe)
    assert [path.name for path in (tmp_path / "whole").glob("checkpoint-*")] == ["checkpoint-1"]
    with pytest.raises(Killed):
        trained_by_us(tmp_path / "cut", recipe, progress=killed_after(5 * 4 * 16))
    rest, other = trained_by_us(tmp_path / "cut", recipe, resume=True)
    assert (whole.before, whole.after, whole.best_step) == (rest.before, rest.after, rest.best_step)
    assert [line["loss"] for line in whole.log if "loss" in line] == [
        line["loss"] for line in rest.log if "loss" in line
    ]
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_run_that_gets_worse_stops_and_keeps_the_start(tmp_path: Path) -> None:
    found, _ = trained_by_us(tmp_path / "run", RECIPE.with_changes(learning_rate=3.0))
    assert found.stopped is not None
    assert "above" in found.stopped or "not finite" in found.stopped
    assert found.best_step == 0
    assert len([line for line in found.log if "loss" in line]) < STEPS
    assert found.after == found.before


def test_training_ends_when_so_many_measurements_were_no_gain(tmp_path: Path) -> None:
    whole, _ = trained_by_us(tmp_path / "whole")
    losses = [line["eval_loss"] for line in whole.log if "eval_loss" in line]
    gains = [1 - after / before for before, after in pairwise(losses)]
    assert min(gains) > 0, "a run that gets better with every step"
    patient, _ = trained_by_us(tmp_path / "patient", RECIPE.with_changes(patience=1))
    assert (patient.stopped, patient.best_step, patient.after) == (None, STEPS, whole.after)
    least = 1 - losses[2] / losses[0] + 1e-6  # what the first two steps bring is just too little
    ended, model = trained_by_us(tmp_path / "ended", RECIPE.with_changes(patience=2, least_gain=least))
    assert ended.stopped is not None
    assert "since step 0" in ended.stopped
    assert [line["eval_loss"] for line in ended.log if "eval_loss" in line] == losses[:3]
    assert (ended.best_step, ended.after["loss"]) == (2, losses[2])
    best = read_tensors(tmp_path / "ended" / "best.safetensors")
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in best.items())


def test_measurements_that_an_interruption_repeats_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglp_llm.healing.keeping.CHECKPOINT_SHARE", 0.0)  # the first one alone
    recipe = RECIPE.with_changes(patience=5, least_gain=0.9)
    whole, _ = trained_by_us(tmp_path / "whole", recipe)
    with pytest.raises(Killed):
        trained_by_us(tmp_path / "cut", recipe, progress=killed_after(4 * 4 * 16))
    rest, _ = trained_by_us(tmp_path / "cut", recipe, resume=True)
    assert whole.stopped is not None
    assert (rest.stopped, rest.best_step, rest.after) == (whole.stopped, whole.best_step, whole.after)
    assert rest.best_step == 5


def test_text_that_is_seen_again_goes_through_the_teacher_once(tmp_path: Path) -> None:
    passes: list[list[int]] = []
    model = wrap_model(tiny_model(Tiny("llama", 0)))
    text = sequences()
    numbers = {tuple(row.tolist()): number for number, row in enumerate(text.input_ids)}
    teacher = OnlineTeacher(model)
    asked: list[list[int]] = []
    plain = teacher.targets

    def targets(chosen: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor | None = None) -> Any:
        assert [numbers[tuple(row.tolist())] for row in ids] == chosen.tolist()
        asked.append(chosen.tolist())
        return plain(chosen, ids, positions)

    teacher.targets = targets  # type: ignore[method-assign]
    # A remembered layer is called too, to take what leaves it from memory; the projection inside is not.
    model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: passes.append(asked[-1]))
    student = wrap_model(drop_layers(tiny_model(Tiny("llama", 0)), PLAN))
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", batch_size=1)
    train(make_trainable(student, RECIPE, PLAN), teacher, text, HELD_OUT, RECIPE, STEPS, run)
    assert len(asked) == STEPS * 4 + 7 * len(HELD_OUT)
    assert sorted(passes) == [[number] for number in range(10)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_batch_changes_nothing(batch_size: int, tmp_path: Path) -> None:
    pair = [trained_by_us(tmp_path / str(size), batch_size=size)[0] for size in (2, batch_size)]
    curves = [[line["loss"] for line in each.log if "loss" in line] for each in pair]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_memory_for_time(tmp_path: Path) -> None:
    plain, _ = trained_by_us(tmp_path / "plain", progress=silent)
    recipe = RECIPE.with_changes(dtype="bfloat16")
    rounded, model = trained_by_us(tmp_path / "rounded", recipe, bfloat16=True)
    assert rounded.after["loss"] == pytest.approx(plain.after["loss"], rel=0.1)
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    ids = sequences().input_ids[:1]
    assert model(input_ids=ids, use_cache=False).logits.dtype == torch.float32


def curve(folder: str) -> list[dict[str, float]]:
    processes = current_processes()
    recipe = RECIPE.with_changes(sequences=6, positions=0.5)
    found, _ = trained_by_us(Path(folder), recipe, batch_size=6 // processes.count, processes=processes)
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found.log]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_give_the_curve_of_one(count: int, tmp_path: Path) -> None:
    alone = curve(str(tmp_path / "one"))
    (tmp_path / "many").mkdir()
    (tmp_path / "out").mkdir()
    for found in in_processes(count, tmp_path / "out", curve, str(tmp_path / "many")):
        if isinstance(found, Exception):
            raise found
        assert len(found) == len(alone)
        for ours, theirs in zip(found, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
