"""Opens a model in one step: finds it, checks it against the settings, and chooses the engine.

Every mistake that can be found before the weights are loaded is found here, and raises one error.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglp_llm.analysis.decisions import check_selection
from sglp_llm.analysis.observing import check_criteria, check_journal
from sglp_llm.analysis.targets import check_context
from sglp_llm.calibration import CalibrationSet, calibration_set, check_spec
from sglp_llm.calibration.cache import cache_folder
from sglp_llm.calibration.self_text import self_text, tokens_to_write
from sglp_llm.checkpoint.export import check_carried, check_plan
from sglp_llm.checkpoint.shorten import check_removable, check_shortened
from sglp_llm.checkpoint.verify import CHECK_SEQUENCES, CHECK_TOKENS
from sglp_llm.compensation import NONE, check_compensation
from sglp_llm.criteria import get_criterion
from sglp_llm.engine import Need
from sglp_llm.errors import UserError
from sglp_llm.memory import EngineMemory, FreeMemory
from sglp_llm.memory.prediction import chosen_engine, forecast
from sglp_llm.method.selection import removable_layers
from sglp_llm.models.footprint import layer_sizes
from sglp_llm.models.heap import trim
from sglp_llm.models.loading import refuse_quantised
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import Recipe
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent
from sglp_llm.records import PrunePlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnForecast = Callable[[EngineMemory, FreeMemory], None]
"""Called before the weights are loaded, with the predicted memory of the analysis and the free memory."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run.

    Attributes:
        model: The model; its weights are loaded when they are first used.
        calibration: The calibration set; ``None`` where no text is needed.
        step: Sequences a step of a pass with gradients that are predicted to fit; ``None`` where nothing was predicted.
    """

    model: OpenedModel
    calibration: CalibrationSet | None
    step: int | None = None


def open_model(
    model: str | Path | PreTrainedModel,
    recipe: Recipe,
    tokenizer: Any = None,
    processes: Processes = ALONE,
    on_forecast: OnForecast | None = None,
) -> OpenedModel:
    """Finds a model and chooses the engine.

    Args:
        model: Hub id, folder, ``.gguf`` file, or a live transformers model.
        recipe: Only its model settings, and those that memory depends on, are used.
        tokenizer: Used instead of the checkpoint's own.
        processes: The processes that share the work; all use the same engine.
        on_forecast: See `OnForecast`.

    Raises:
        UserError: There is no such model, it cannot be pruned, or the chosen engine cannot run it.
    """
    opened = _found(model, recipe, tokenizer, processes)
    _choose_engine(opened, recipe, processes, on_forecast)
    return opened


def open_for_analysis(
    model: str | Path | PreTrainedModel,
    recipe: Recipe,
    tokenizer: Any = None,
    calibration: CalibrationSet | str | None = None,
    *,
    output: Path | None = None,
    processes: Processes = ALONE,
    on_forecast: OnForecast | None = None,
    progress: Progress = silent,
) -> Inputs:
    """Opens a model and its calibration set for an analysis.

    Args:
        model: See `open_model`.
        recipe: All settings.
        tokenizer: Needed with a live model, unless ``calibration`` holds token ids.
        calibration: The set, or ``None`` for the one that the recipe names.
        output: Where a checkpoint will be written.
        processes: See `open_model`.
        on_forecast: See `OnForecast`.
        progress: Reports tokens while the model writes its calibration text.

    Raises:
        UserError: Something is wrong with the model, the text or the settings, or the output is inside the source.
    """
    opened = _checked(model, recipe, [recipe], tokenizer, processes)
    _check_apart(opened, output)
    sequences = read_calibration(opened, recipe, calibration, progress)
    return Inputs(opened, sequences, _choose_engine(opened, recipe, processes, on_forecast))


def open_for_plan(
    model: str | Path | PreTrainedModel,
    recipe: Recipe,
    plan: PrunePlan,
    tokenizer: Any = None,
    calibration: CalibrationSet | str | None = None,
    *,
    output: Path,
    verify: bool = True,
    processes: Processes = ALONE,
    progress: Progress = silent,
) -> Inputs:
    """Opens a model to export by a given plan, with as much text as the reload check needs.

    Args:
        model: See `open_model`.
        recipe: All settings; those that choose layers are not used.
        plan: The plan.
        tokenizer: See `open_for_analysis`.
        calibration: See `open_for_analysis`.
        output: Where the checkpoint will be written.
        verify: Whether there will be a reload check; of quantised weights, which are copied, there is none.
        processes: See `open_model`.
        progress: See `open_for_analysis`.

    Raises:
        UserError: See `open_for_analysis`; also a plan for another model.
    """
    opened = _found(model, recipe, tokenizer, processes)
    stored = opened.source is not None
    if opened.source is not None and opened.source.format == "gguf" and plan.source is not None:
        # A plan may have been made for the safetensors checkpoint that the file was converted from.
        stored = plan.source.name.endswith(".gguf")
    quantised = bool(opened.source and opened.source.quantised)
    check_plan(plan, opened.identity, opened.num_layers, partial(_layer_sizes, opened), stored, quantised)
    check_shortened(opened, plan.kept)
    if plan.replaced:
        refuse_quantised(opened.source, "a plan that replaces weights")
    if recipe.healing is not None:
        refuse_quantised(opened.source, "training")
    _check_apart(opened, output)
    sequences = None
    if verify and not quantised:
        seq_len = min(recipe.seq_len, CHECK_TOKENS, _positions(opened) or CHECK_TOKENS)
        checked = replace(recipe, samples=CHECK_SEQUENCES, seq_len=seq_len)
        sequences = read_calibration(opened, checked, calibration, progress)
    _choose_engine(opened, _forward_passes(recipe), processes, None)
    return Inputs(opened, sequences)


def _layer_sizes(opened: OpenedModel) -> tuple[int, ...]:
    from sglp_llm.adapters.structure.derive import empty_model

    layers = empty_model(opened.config).get_submodule(opened.adapter.layers)
    assert isinstance(layers, torch.nn.ModuleList)
    return layer_sizes(layers)


def open_for_comparison(
    model: str | Path | PreTrainedModel, recipe: Recipe, criteria: Sequence[str], tokenizer: Any = None
) -> OpenedModel:
    """Opens a model to compare criteria on; it runs with the resident engine.

    Args:
        model: See `open_model`.
        recipe: The settings that the criteria share.
        criteria: Names of the criteria.
        tokenizer: See `open_for_analysis`.

    Raises:
        UserError: Something is wrong with the model or the settings.
    """
    recipes = [replace(recipe, criterion=name, options={}) for name in criteria]
    return _checked(model, replace(recipe, journal=None), recipes, tokenizer, ALONE)


def read_calibration(
    opened: OpenedModel, recipe: Recipe, given: CalibrationSet | str | None = None, progress: Progress = silent
) -> CalibrationSet:
    """The given calibration set, or the one that the recipe names.

    If the model writes some of the text itself (``self``), it is loaded afterwards.

    Args:
        opened: The model.
        recipe: Names the text and its size.
        given: A calibration set, or ``None``.
        progress: See `open_for_analysis`.

    Raises:
        UserError: The text cannot be read, there is too little of it, or a token is not in the model's vocabulary; or the model
            is to write the text and does not fit into memory as a whole.
    """
    if not isinstance(given, CalibrationSet):
        check_spec(recipe.calibration)
        given = calibration_set(
            opened.tokenizer,
            recipe.calibration,
            samples=recipe.samples,
            seq_len=recipe.seq_len,
            seed=recipe.seed,
            self_file=self_file(opened, recipe, progress),
        )
    opened.check_tokens(given.input_ids)
    return given


def self_file(opened: OpenedModel, recipe: Recipe, progress: Progress = silent) -> Path | None:
    """The file with the text that the model writes itself; ``None`` if the recipe needs none.

    Args:
        opened: The model that writes; it is loaded if there is text to write.
        recipe: Names the text and its size.
        progress: See `open_for_analysis`.

    Raises:
        UserError: The model does not fit into memory as a whole.
    """
    tokens = tokens_to_write(recipe.calibration, recipe.samples, recipe.seq_len)
    if not tokens:
        return None
    needs_it_whole = f"calibration {recipe.calibration!r}: to write text the whole model must be in memory"
    if recipe.engine == "streamed":
        raise UserError(f"{needs_it_whole}: leave out --engine streamed, or name another text")
    # The analysis is planned afterwards.
    if chosen_engine(opened, _forward_passes(recipe)) == "streamed":
        raise UserError(f"{needs_it_whole}, and is predicted not to fit: name another text, or --engine resident")
    folder = cache_folder("self-text")
    # Not the recipe's batch size: no result depends on that one, and this text does.
    return self_text(
        opened.load(),
        opened.tokenizer,
        tokens=tokens,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        folder=folder,
        progress=progress,
    )


def _found(model: Any, recipe: Recipe, tokenizer: Any, processes: Processes) -> OpenedModel:
    if processes.count > 1 and recipe.device_map not in (None, "cpu"):
        raise UserError(
            f"device_map {recipe.device_map!r} places one copy of the model, and each of {processes.count} processes needs "
            "its own: leave it out, or start one process"
        )
    return OpenedModel(model, recipe.revision, recipe.dtype, recipe.device_map, tokenizer)


def _checked(
    model: Any, recipe: Recipe, recipes: Sequence[Recipe], tokenizer: Any, processes: Processes
) -> OpenedModel:
    """Finds a model and checks the settings: those of each criterion by ``recipes``, all others by ``recipe``."""
    for each in recipes:
        check_criteria(each)
    check_journal(recipe)
    opened = _found(model, recipe, tokenizer, processes)
    _check_gradients(opened, recipe, recipes)
    check_compensation(recipe.compensate, opened.adapter, opened.text_config, recipe.samples)
    for each in recipes:
        check_selection(each, opened.num_layers, opened.staying)
    protect = (recipe.protect.first, recipe.protect.last)
    check_removable(opened, removable_layers(opened.num_layers, protect, opened.staying))
    check_context(recipe, _positions(opened), opened.identity.name)
    longest = _positions(opened)
    if longest is not None and recipe.seq_len > longest:
        raise UserError(
            f"seq_len {recipe.seq_len} is longer than the {longest} positions that {opened.identity.name} has"
        )
    return opened


def _forward_passes(recipe: Recipe) -> Recipe:
    """A recipe that takes the memory of forward passes alone, where nothing is analysed."""
    return replace(recipe, criterion="random", also=(), options={}, segments=None, compensate=NONE)


def _check_gradients(opened: OpenedModel, recipe: Recipe, recipes: Sequence[Recipe]) -> None:
    """Refuses what quantised weights cannot do: they have no gradients, and take no new values."""
    for each in recipes:
        for name in (each.deciding_criterion, *each.also):
            if get_criterion(name).needs & (Need.BACKWARD | Need.SYNAPTIC_FLOW):
                refuse_quantised(opened.source, f"criterion {each.criterion}, which computes gradients,")
    if recipe.compensate != NONE:
        refuse_quantised(opened.source, f"compensate {recipe.compensate}")
    if recipe.healing is not None:
        refuse_quantised(opened.source, "training")


def _choose_engine(
    opened: OpenedModel, recipe: Recipe, processes: Processes, on_forecast: OnForecast | None
) -> int | None:
    """Switches to the streamed engine where the recipe says so, or where ``auto`` predicts that the whole model does not fit.

    All processes use the same engine, because the order of the collective sums depends on it.

    Raises:
        UserError: The model cannot be streamed, or there is no scratch folder.
    """
    if opened.source is not None and opened.is_loaded:
        let_go(opened)  # it wrote text; its weights would count as memory that is not free
    # A forecast runs the model's code on fake tensors, so it is made only where it is shown or decides.
    is_open = recipe.engine == "auto" and opened.can_stream
    found = forecast(opened, recipe) if is_open or on_forecast is not None else None
    wanted = chosen_engine(opened, recipe) if found is None else found[0].engine
    votes = float(processes.sum(torch.tensor(float(wanted == "streamed"), dtype=torch.float64)))
    if votes > 0:
        opened.stream(recipe.scratch)
    if on_forecast is not None and found is not None:
        on_forecast(*found)
    if found is None:
        return None
    # Processes may find different memory free, but each keeps its own states on its own device.
    opened.state_bytes = found[0].state_bytes
    return found[0].step


def let_go(opened: OpenedModel) -> None:
    """Releases a model's weights, and returns their memory to the device and the system."""
    opened.release()
    give_back()


def give_back() -> None:
    """Returns the memory of what nobody holds to the device and the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim()


def _check_apart(opened: OpenedModel, output: Path | None) -> None:
    """Checks what an export would fail at: an output inside the source, and files that it would not copy."""
    if output is not None and opened.source is not None:
        opened.source.check_apart(output)
        if opened.source.path.is_dir():
            check_carried(opened.source.path)


def _positions(opened: OpenedModel) -> int | None:
    """The largest number of positions of the model; ``None`` where its configuration sets no limit."""
    return getattr(opened.text_config, "max_position_embeddings", None)
