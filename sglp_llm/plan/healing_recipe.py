"""HealingRecipe <-> YAML: every setting of the training that follows a removal of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sglp_llm.errors import UserError, unknown
from sglp_llm.plan.shipped import shipped_healing_recipes
from sglp_llm.plan.yaml_files import dump_yaml, read_yaml, record_from_dict

HEALING_FILE_NAME = "sglp_healing.json"
LOG_FILE_NAME = "train_log.jsonl"
HEALING_RECIPE_FILE_NAME = "sglp_healing_recipe.yaml"

SHARED = ("data", "seed", "engine", "scratch")
"""What the training after a removal takes from the removal's recipe, unless its own says otherwise."""

_LENGTHS = ("tokens", "minutes", "epochs")
_POSITIVE = (
    *_LENGTHS,
    *("sequences", "batch_size", "temperature", "top_k", "learning_rate", "max_grad_norm", "evaluations"),
    "patience",
    *("seam_layers", "last_layers", "lora_rank", "lora_alpha", "prompt_tokens", "shortest"),
)
_RATES = {"auto": 2e-4, "full": 2e-4, "partial": 3e-4, "seam": 5e-4, "lora": 1e-3}


@dataclass(frozen=True)
class HealingRecipe:
    """The settings of one run of ``heal``; the defaults are the program's.

    Attributes:
        teacher: Model whose predictions are the target; none = the model that the plan in the folder was made for.
        distil: Whether there is a teacher; without one the loss is that of the next token alone.
        train: What is trained: ``full``, all parameters; ``seam``, the decoder layers around each cut; ``partial``, these, the
            last layers, the final norm and the head; ``lora``, low-rank adapters on the linears of all decoder layers; ``auto``,
            the first of full, seam and lora that is predicted to fit into memory.
        seam_layers: Decoder layers on each side of a cut, for ``seam`` and ``partial``.
        seam_side: Only those ``before`` the cuts, only those ``behind`` them, or ``both``.
        last_layers: Decoder layers at the end, for ``partial``.
        lora_rank: Rank of the adapters.
        lora_alpha: Their scale is ``lora_alpha / lora_rank``.
        data: Training text: what `sglp_llm.calibration` can read, or a mixture such as ``"wikitext2:1 c4:1"``; ``auto`` as for
            a calibration.
        answers: Who has written the answers in conversations: ``data``, or the ``teacher``, which is asked the same questions.
        on_policy: Share of the steps whose sequences the student continues itself, by sampling; their loss is that of its own
            tokens (Agarwal et al., arXiv 2306.13649).
        prompt_tokens: Tokens of a sequence that the student continues.
        shortest: Tokens that it adds in the first step. They become more, until in the last step they fill ``seq_len``.
        tokens: Number of training tokens, or
        minutes: wall time, from which the number of steps follows by timing the first ones, or
        epochs: passes over all of the text.
        repeat: Whether text is seen again where there is less of it than tokens to train on; otherwise that is an error.
        held_out: Share of the sequences, at least one, that is not trained on; its loss decides which weights are kept.
        seq_len: Tokens a sequence.
        sequences: Sequences of one optimizer step, over all processes.
        batch_size: Sequences computed at once by one process; ``auto`` = as many as one step has, fewer where memory runs out.
        alpha: Weight of the divergence from the teacher; the next-token loss has ``1 - alpha``.
        beta: Which divergence: 0 is ``KL(teacher || student)``, 1 is ``KL(student || teacher)``, and between them it is the
            generalised Jensen-Shannon divergence (arXiv 2306.13649, section 2).
        positions: Share of a sequence's positions whose losses are computed in a step, drawn at random: the mean is estimated
            without bias, and the heads of both models cost so much less.
        temperature: Of both distributions in the divergence, which is multiplied by its square.
        hidden_weight: Weight of the difference of the hidden states behind the cuts; the other losses have ``1 - hidden_weight``.
        top_k: Use the teacher's ``top_k`` most likely tokens, and one bucket for the rest; none = all logits.
        store: Whether the teacher's top-k is computed beforehand and read from disk, so that the teacher is not in memory while
            the student is trained; none = where both are predicted not to fit.
        learning_rate: Peak of AdamW's rate; none = as ``train`` needs it (full 2e-4, partial 3e-4, seam 5e-4, lora 1e-3).
        schedule: How the rate falls.
        final_rate: Share of the peak at which it ends.
        warmup_steps: Steps in which it rises.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are clipped to this norm.
        evaluations: How often the held-out loss is measured in a run.
        patience: Training ends when so many measurements in a row were no gain; none = it never ends early.
        least_gain: Share of the held-out loss by which it must fall to be a gain, for ``patience``.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        dtype: What is computed in; ``auto`` is bfloat16 on a device that has it, and float32 elsewhere.
        engine: Of the teacher, where its logits are computed beforehand: ``resident``, ``streamed``, or ``auto`` for what fits.
        scratch: Folder for the hidden states of a streamed teacher; none = the host's memory.
        seed: Of everything that is drawn.
    """

    teacher: str | None = None
    distil: bool = True
    train: Literal["auto", "seam", "lora", "partial", "full"] = "auto"
    seam_layers: int = 2
    seam_side: Literal["both", "before", "behind"] = "both"
    last_layers: int = 3
    lora_rank: int = 16
    lora_alpha: int = 32
    data: str = "auto"
    answers: Literal["data", "teacher"] = "data"
    on_policy: float = 0.0
    prompt_tokens: int = 64
    shortest: int = 16
    tokens: int | None = None
    minutes: float | None = None
    epochs: float | None = None
    repeat: bool = False
    held_out: float = 0.05
    seq_len: int = 512
    sequences: int = 4
    batch_size: Literal["auto"] | int = "auto"
    alpha: float = 1.0
    beta: float = 0.0
    positions: float = 1.0
    temperature: float = 1.0
    hidden_weight: float = 0.0
    top_k: int | None = None
    store: bool | None = None
    learning_rate: float | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_rate: float = 0.0
    warmup_steps: int = 2
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    evaluations: int = 10
    patience: int | None = None
    least_gain: float = 0.0
    gradient_checkpointing: bool = False
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    engine: Literal["auto", "resident", "streamed"] = "auto"
    scratch: str | None = None
    seed: int = 0

    @property
    def peak_rate(self) -> float:
        """The learning rate after the warm-up; that of ``auto`` is for all parameters."""
        return _RATES[self.train] if self.learning_rate is None else self.learning_rate

    def with_changes(self, **changes: Any) -> HealingRecipe:
        """A copy with every change that is not None; a new length (tokens, minutes, epochs) replaces the old one.

        Raises:
            UserError: A key is unknown or a value is out of range.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        return healing_recipe_from_dict(healing_changes(self.to_dict(), given), "settings")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML and JSON; settings that are not set are left out."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def healing_changes(settings: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    """Settings of a training with changes; a new length (tokens, minutes, epochs) replaces the old one.

    Args:
        settings: Plain data of a healing recipe, defaults left out or not.
        changes: More of it; ``True`` changes nothing.
    """
    if not isinstance(changes, Mapping):
        return dict(settings)
    old = {key: value for key, value in settings.items() if key not in _LENGTHS or not set(_LENGTHS) & set(changes)}
    return {**old, **changes}


def healing_recipe_from_dict(data: object, where: str = "recipe") -> HealingRecipe:
    """Checks plain data and makes a recipe of it.

    Raises:
        UserError: A key is unknown (the message names the nearest one), or a value has the wrong type or is out of range.
    """
    recipe: HealingRecipe = record_from_dict(HealingRecipe, data, where)
    if len(given := [key for key in _LENGTHS if getattr(recipe, key) is not None]) > 1:
        raise UserError(f"{where}: give one of {', '.join(_LENGTHS)}, not {' and '.join(given)}")
    for key in _POSITIVE:
        value = getattr(recipe, key)
        if value not in (None, "auto") and not value > 0:
            raise UserError(f"{where}: {key} must be above 0, not {value!r}")
    for key in ("alpha", "beta", "final_rate", "hidden_weight", "on_policy", "least_gain"):
        if not 0 <= getattr(recipe, key) <= 1:
            raise UserError(f"{where}: {key} must be between 0 and 1, not {getattr(recipe, key)!r}")
    for key in ("warmup_steps", "weight_decay"):
        if getattr(recipe, key) < 0:
            raise UserError(f"{where}: {key} must not be negative, not {getattr(recipe, key)!r}")
    if not 0 < recipe.held_out < 1:
        raise UserError(f"{where}: held_out must be between 0 and 1, both excluded, not {recipe.held_out!r}")
    if not 0 < recipe.positions <= 1:
        raise UserError(f"{where}: positions must be above 0 and at most 1, not {recipe.positions!r}")
    if recipe.seq_len < 2:
        raise UserError(f"{where}: seq_len must be at least 2, not {recipe.seq_len}")
    _check_teacher(recipe, where)
    if recipe.on_policy and recipe.prompt_tokens + recipe.shortest > recipe.seq_len:
        raise UserError(
            f"{where}: on_policy: prompt_tokens {recipe.prompt_tokens} and shortest {recipe.shortest} are more than seq_len "
            f"{recipe.seq_len}"
        )
    if recipe.on_policy and recipe.minutes is not None:
        raise UserError(f"{where}: on_policy: no time is known for what the student writes: give tokens, not minutes")
    return recipe


def _check_teacher(recipe: HealingRecipe, where: str) -> None:
    needs_one = {
        "teacher names a model": recipe.teacher is not None,
        "store keeps the teacher's logits": recipe.store,
        "answers are to be the teacher's": recipe.answers == "teacher",
        "hidden_weight compares with the teacher": recipe.hidden_weight,
        "on_policy asks the teacher": recipe.on_policy,
    }
    needs_it_in_memory = {"hidden_weight": recipe.hidden_weight, "on_policy": recipe.on_policy}
    for what, wanted in needs_one.items():
        if wanted and not recipe.distil:
            raise UserError(f"{where}: {what}, and distil is false: leave one of them out")
    for key, wanted in needs_it_in_memory.items():
        if wanted and recipe.store:
            raise UserError(f"{where}: {key} needs the teacher in memory, and store is true: leave one of them out")


def load_healing_recipe(name: str | Path) -> HealingRecipe:
    """Reads a healing recipe from a YAML file, or one that comes with the package by its name.

    Raises:
        UserError: There is no such file or name, it is not YAML, or it is not a healing recipe.
    """
    shipped = shipped_healing_recipes()
    path = shipped.get(str(name), Path(name))
    if path.suffix not in (".yaml", ".yml"):
        raise unknown("healing recipe", str(name), shipped)
    data = read_yaml(path, "healing recipe")
    return healing_recipe_from_dict({} if data is None else data, str(name))


def save_healing_recipe(recipe: HealingRecipe, path: Path) -> None:
    """Writes the recipe as YAML, keys in the order of `HealingRecipe`."""
    path.write_text(dump_yaml(recipe.to_dict()), encoding="utf-8")
