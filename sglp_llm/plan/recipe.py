"""Recipe <-> YAML: every setting of a run in one record. An unknown key is an error that names the nearest known key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sglp_llm.errors import UserError, unknown
from sglp_llm.plan.healing_recipe import HealingRecipe, healing_changes, healing_recipe_from_dict
from sglp_llm.plan.shipped import preset_settings, shipped_recipes
from sglp_llm.plan.yaml_files import dump_yaml, read_yaml, record_from_dict
from sglp_llm.records import Budget

RECIPE_FILE_NAME = "sglp_recipe.yaml"
_BUDGET = {each.name for each in dataclasses.fields(Budget)}

SGLP = "sglp"
"""The paper's pipeline: CKA segments, and GradNorm inside them."""


TASK = "task:"
"""What an objective begins with that names a task or a suite."""


@dataclass(frozen=True)
class Protect:
    """How many layers at the front and at the end are never removed (Shortened LLaMA's "+" keeps 4 and 2)."""

    first: int = 0
    last: int = 0


@dataclass(frozen=True)
class Recipe:
    """The settings of one pruning run; the defaults are the program's.

    Attributes:
        model: Hub id, folder or ``.gguf`` file.
        revision: Hub branch, tag or commit.
        dtype: The dtype of the analysis. A GGUF or ``.bin`` source is exported in it too; safetensors are copied as they are.
        device_map: accelerate's placement, ``auto`` for instance; none = one device, the GPU where there is one.
        calibration: Text that `sglp_llm.calibration` can read: ``wikitext2``, ``text:FILE``, ``self``, ``wikitext2:1 c4:3``, ...;
            ``auto`` is WikiText-2 and C4 in equal parts, or ``self`` where the Hub cannot be read.
        samples: Number of calibration sequences.
        seq_len: Tokens per sequence.
        seed: Seed of everything that is random.
        trial_samples: Number of sequences, from the first on, used by criteria that try removals (ppl, sleb, kl, cka_output,
            search); none = all of them.
        trial_dtype: What trials of removals, and the losses that judge compensations, are computed in: ``model``, the dtype of
            the analysis; ``auto``, matrix products in bfloat16 where a float32 model is on a CPU that is faster at these.
        journal: Folder in which the criterion ``search`` keeps the results of its trials, so that an interrupted run with the
            same model, sequences and versions resumes.
        engine: ``resident`` holds the whole model in memory, ``streamed`` one decoder layer at a time; ``auto`` is resident
            where that is predicted to fit. Both give the same plan.
        scratch: Folder for the hidden states that the streamed engine stores between layers; none = the host's memory.
        batch_size: Sequences that are computed at once; with gradients fewer where memory is short, one on the CPU and where an
            observer needs whole gradients. No result depends on it, except for rounding.
        criterion: ``sglp`` (CKA segments + gradnorm inside them, the paper's pipeline) or a name from ``criteria/``.
        also: More criteria to score in the same pass, for the record.
        options: Settings of single criteria, such as ``{angular: {tokens: all}}``.
        kernel: CKA kernel, ``cosine`` (our default) or ``linear`` (the paper's).
        minibatch_sequences: Calibration sequences per CKA minibatch.
        minibatch_positions: Evenly spaced positions of each of them.
        segments: Whether the criterion's scores are compared inside CKA segments; none = as the criterion is defined (``sglp``:
            yes, all others: no). A criterion that gives a set cannot.
        num_segments: Number of segments, or ``auto``.
        features: What the segmentation is computed from, ``column_sum`` or ``rows``.
        segments_rule: How ``auto`` finds the number: ``auto`` by ``min_drop``, ``paper`` as the paper's published code does.
        min_drop: When the rule ``auto`` stops adding segments: at a fall of less than this share of the loss of one segment.
        protect: Layers that are never removed.
        ratio: Share of the layers to remove, or
        drop: their number, or
        target_params: the number of parameters that may remain, or
        target_memory: the bytes that weights and KV cache of one sequence may take, such as ``6GB``, or
        target_latency: the time that decoding a token may take on this device: ``0.8x`` of the whole model's, or ``25ms``.
        context: Tokens in that KV cache; none = the longest context of the model, 4096 at most.
        compensate: How the kept layers compensate for the removed ones: ``none``, or a name from ``compensation/``.
        held_out: Share of the calibration sequences, the last ones, that a compensation is evaluated on and not fitted on.
        candidates: How many candidate sets of a search are compensated in closed form, or scored on a task, before the best one
            is taken.
        heal: Training on the original's predictions after the removal: ``true``, or the settings of a healing recipe that differ
            from its defaults. Its text is the calibration text unless ``data`` names another.
        max_shard_size: Largest file of the output, such as ``2GB``; none = shards like the source's.
    """

    model: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device_map: str | None = None
    calibration: str = "auto"
    samples: int = 32
    seq_len: int = 512
    seed: int = 0
    trial_samples: int | None = None
    trial_dtype: Literal["model", "auto"] = "model"
    journal: str | None = None
    engine: Literal["auto", "resident", "streamed"] = "auto"
    scratch: str | None = None
    batch_size: int = 8
    criterion: str = "sglp"
    also: tuple[str, ...] = ()
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    kernel: Literal["cosine", "linear"] = "cosine"
    minibatch_sequences: int = 8
    minibatch_positions: int = 64
    segments: bool | None = None
    num_segments: int | Literal["auto"] = "auto"
    features: Literal["column_sum", "rows"] = "column_sum"
    segments_rule: Literal["auto", "paper"] = "auto"
    min_drop: float = 0.05
    protect: Protect = field(default_factory=Protect)
    ratio: float | None = None
    drop: int | None = None
    target_params: int | None = None
    target_memory: str | None = None
    target_latency: str | None = None
    context: int | None = None
    compensate: str = "none"
    held_out: float = 0.25
    candidates: int = 3
    heal: bool | dict[str, Any] = False
    max_shard_size: str | None = None

    @property
    def deciding_criterion(self) -> str:
        """The criterion that chooses the layers: ``gradnorm`` for ``sglp``, which is GradNorm inside CKA segments."""
        return "gradnorm" if self.criterion == SGLP else self.criterion

    @property
    def judging_task(self) -> str | None:
        """The tasks or the suite that candidate sets are scored on: NAME of the option ``objective: task:NAME``."""
        objective = self.options.get(self.deciding_criterion, {}).get("objective")
        return objective.removeprefix(TASK) if isinstance(objective, str) and objective.startswith(TASK) else None

    @property
    def is_segmented(self) -> bool:
        """Whether layers are compared inside CKA segments only."""
        return self.criterion == SGLP if self.segments is None else self.segments

    @property
    def budget(self) -> Budget:
        """The budget settings as one record; `check_budget` requires that exactly one of them is set."""
        return Budget(**{name: getattr(self, name) for name in _BUDGET})

    @property
    def healing(self) -> HealingRecipe | None:
        """The settings of the training after the removal; ``None`` without one."""
        if self.heal is False:
            return None
        shared = {"data": self.calibration, "seed": self.seed, "engine": self.engine, "scratch": self.scratch}
        return HealingRecipe().with_changes(**shared).with_changes(**({} if self.heal is True else self.heal))

    def with_changes(self, **changes: Any) -> Recipe:
        """A copy with every change that is not None; a new budget replaces the old one, options and settings of the training are
        added to the old ones.

        Raises:
            UserError: A key is unknown or a value has the wrong type.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        base = self.to_dict()
        if _BUDGET & set(given):
            base = {key: value for key, value in base.items() if key not in {*_BUDGET, "context"}}
        if isinstance(given.get("protect"), Mapping):
            given["protect"] = {**base["protect"], **given["protect"]}
        if isinstance(base["heal"], Mapping) and given.get("heal"):
            given["heal"] = healing_changes(base["heal"], given["heal"])
        changed = recipe_from_dict({**base, **given}, "settings")
        if "options" in given:
            options = {
                name: {**self.options.get(name, {}), **changed.options.get(name, {})}
                for name in {**self.options, **changed.options}
            }
            changed = dataclasses.replace(changed, options=options)
        return changed

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML and JSON; settings that are not set are left out."""
        plain = {**dataclasses.asdict(self), "also": list(self.also)}
        return {key: value for key, value in plain.items() if value is not None}


def recipe_from_dict(data: object, where: str = "recipe") -> Recipe:
    """Checks plain data and makes a recipe of it.

    Raises:
        UserError: A key is unknown (the message names the nearest one) or a value has the wrong type.
    """
    recipe: Recipe = record_from_dict(Recipe, data, where)
    for key in ("samples", "batch_size", "minibatch_sequences", "minibatch_positions", "candidates"):
        _at_least(1, getattr(recipe, key), f"{where}: {key}")
    for key, layers in vars(recipe.protect).items():
        if layers < 0:
            raise UserError(f"{where}: protect: {key} must not be negative, not {layers}")
    if isinstance(recipe.heal, Mapping):
        healing_recipe_from_dict(recipe.heal, f"{where}: heal")
    _at_least(2, recipe.seq_len, f"{where}: seq_len")
    for key in ("trial_samples", "context"):
        if (number := getattr(recipe, key)) is not None:
            _at_least(1, number, f"{where}: {key}")
    if recipe.scratch is not None and recipe.engine == "resident":
        raise UserError(f"{where}: scratch is for the streamed engine: leave it out, or the engine 'resident'")
    if recipe.num_segments != "auto":
        _at_least(1, recipe.num_segments, f"{where}: num_segments")
        if recipe.segments_rule != "auto":
            raise UserError(
                f"{where}: segments_rule finds the number of segments, and num_segments gives it: leave out one"
            )
    for key in ("journal", "scratch"):
        if getattr(recipe, key) == "":  # it would be the current folder
            raise UserError(
                f"{where}: {key} must name a folder, and is empty: leave it out, or write . for the current one"
            )
    if not 0 < recipe.held_out < 1:
        raise UserError(f"{where}: held_out must be between 0 and 1, not {recipe.held_out!r}")
    if not recipe.min_drop >= 0:
        raise UserError(f"{where}: min_drop must not be negative, not {recipe.min_drop!r}")
    return recipe


def load_recipe(name: str | Path) -> Recipe:
    """Reads a recipe from a YAML file, or one of the recipes that come with the package by its name.

    Its key ``preset`` stands for a preset's settings; the other keys replace them.

    Raises:
        UserError: There is no such file or name, it is not YAML, or it is not a recipe.
    """
    path = Path(name)
    shipped = shipped_recipes()
    if str(name) in shipped:
        data = read_yaml(shipped[str(name)], "recipe")
    elif path.suffix in (".yaml", ".yml"):
        data = read_yaml(path, "recipe")
    else:
        raise unknown("recipe", str(name), shipped)
    if isinstance(data, dict) and "preset" in data:
        given = data.pop("preset")
        if not isinstance(given, str):
            raise UserError(f"{name}: preset must be text, not {given!r}")
        data = {**preset_settings(given), **data}
    return recipe_from_dict({} if data is None else data, str(name))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the recipe as YAML, keys in the order of `Recipe`."""
    path.write_text(dump_yaml(recipe.to_dict()), encoding="utf-8")


def _at_least(least: int, value: int, where: str) -> None:
    if value < least:
        raise UserError(f"{where} must be at least {least}, not {value}")
