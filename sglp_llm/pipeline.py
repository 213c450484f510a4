"""The whole story: `analyze` makes a plan, `prune` makes a plan and the shortened checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglp_llm.adapters import get_adapter
from sglp_llm.analysis import run_analysis, software_versions
from sglp_llm.calibration import CalibrationSet, calibration_set
from sglp_llm.checkpoint.export import carry_over as carry_over_files
from sglp_llm.checkpoint.export import check_plan, drop_layers, export_from_files, export_from_model
from sglp_llm.checkpoint.publish import atomic_folder, check_output
from sglp_llm.checkpoint.replaced import as_stored
from sglp_llm.checkpoint.verify import CHECK_SEQUENCES, CHECK_TOKENS, expected_logits, verify_checkpoint
from sglp_llm.compensation import check_compensation
from sglp_llm.errors import UserError
from sglp_llm.observing import check_criteria, check_journal, is_segmented
from sglp_llm.plans import PLAN_FILE_NAME, save_plan
from sglp_llm.prediction import chosen_engine, forecast
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent
from sglp_llm.recipe import RECIPE_FILE_NAME, Recipe, preset_settings, save_recipe
from sglp_llm.records import Analysis, EngineMemory, FreeMemory, PrunePlan, RunReport
from sglp_llm.report.model_card import write_model_card
from sglp_llm.selection import check_budget
from sglp_llm.sizes import parse_bytes
from sglp_llm.subject import Subject
from sglp_llm.texts import check_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnForecast = Callable[[EngineMemory, FreeMemory], None]
"""Told, before the weights are loaded, what the analysis is predicted to hold, and what is free."""


def analyze(
    model: str | Path | PreTrainedModel,
    *,
    recipe: Recipe | None = None,
    preset: str | None = None,
    tokenizer: Any = None,
    calibration: CalibrationSet | str | None = None,
    progress: Progress = silent,
    processes: Processes = ALONE,
    on_forecast: OnForecast | None = None,
    **settings: Any,
) -> Analysis:
    """Decides which decoder layers to remove. Writes nothing.

    Args:
        model: Hub id, folder, ``.gguf`` file, or a live transformers model.
        recipe: The settings; the defaults are `Recipe`'s, with a quarter of the layers as the budget.
        preset: A way to choose and repair, from ``sglp-llm ls presets``; it changes the recipe, and the settings change it.
        tokenizer: Needed with a live model, unless ``calibration`` holds token ids.
        calibration: The calibration set, or where to read it (``"wikitext2"``, ``"text:FILE"``, ``"pydoc"``, ...).
        progress: Told the sequences that are done.
        processes: Those that share the sequences (`current_processes`); all return the same.
        on_forecast: See `OnForecast`.
        **settings: Single settings that replace the recipe's: ``ratio=0.25``, ``criterion="bi"``, ...

    Raises:
        UserError: Something in the model, the text or the settings is wrong; one line says what.
    """
    with processes.failing_together():
        recipe = _recipe(recipe, preset, calibration, settings)
        if not recipe.budget.to_dict():
            recipe = replace(recipe, ratio=0.25)
        _check_placement(recipe, processes)
        subject = open_subject(model, recipe, tokenizer)
        sequences = read_calibration(subject, recipe, calibration)
        _choose_engine(subject, recipe, processes, on_forecast)
        return run_analysis(subject, recipe, sequences, progress, processes)


def prune(
    model: str | Path | PreTrainedModel,
    output: str | Path,
    *,
    plan: PrunePlan | None = None,
    recipe: Recipe | None = None,
    preset: str | None = None,
    tokenizer: Any = None,
    calibration: CalibrationSet | str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = silent,
    processes: Processes = ALONE,
    on_forecast: OnForecast | None = None,
    **settings: Any,
) -> RunReport:
    """Removes decoder layers and writes the shortened checkpoint.

    The output appears whole or not at all. A live model is shortened in place, like `drop_layers` does. Of several processes
    the main one writes, and the others return after the analysis.

    Args:
        model: Hub id, folder, ``.gguf`` file, or a live transformers model.
        output: Folder to write.
        plan: Skips the analysis; ``recipe``'s budget and criterion are not used then. Where it was compensated, the new weights
            are written.
        recipe: See `analyze`; it must hold a budget unless there is a plan.
        preset: See `analyze`.
        tokenizer: See `analyze`.
        calibration: See `analyze`; with a plan it is only read for the reload check (default: ``"pydoc"``).
        overwrite: Replace an output that exists.
        verify: Reload the result with plain transformers and compare it with the source, layers skipped.
        progress: Told sequences and bytes that are done.
        processes: See `analyze`.
        on_forecast: See `OnForecast`.
        **settings: See `analyze`.

    Raises:
        UserError: See `analyze`; also an output that exists or lies inside the source, or a plan for another model.
        VerificationError: The reload check failed; nothing is left at ``output``.
    """
    output = Path(output).expanduser()
    seconds: dict[str, float] = {}
    analysis = None
    with processes.failing_together():
        if plan is not None and calibration is None and recipe is None:
            calibration = "pydoc"  # any text does for the reload check, and this one is always there
        recipe = _recipe(recipe, preset, calibration, settings)
        _check_placement(recipe, processes)
        check_output(output, overwrite)
        max_shard_size = None if recipe.max_shard_size is None else parse_bytes(recipe.max_shard_size)
        if plan is None and not recipe.budget.to_dict():
            raise UserError("how much to remove? Give a ratio, a number of layers to drop, target_params, or a plan")
        if plan is None:
            subject = open_subject(model, recipe, tokenizer)
        else:
            subject = _open(model, recipe, tokenizer)
            check_plan(plan, subject.identity, subject.num_layers, stored=subject.source is not None)
        if subject.source is not None:
            subject.source.check_apart(output)
        sequences = None
        if plan is None:
            sequences = read_calibration(subject, recipe, calibration)
        elif verify:
            sequences = read_calibration(subject, _enough_for_the_check(recipe, subject), calibration)
        _choose_engine(subject, recipe, processes, on_forecast if plan is None else None)
        if plan is None:
            assert sequences is not None
            with _timed(seconds, "analysis"):
                analysis = run_analysis(subject, recipe, sequences, progress, processes)
            plan = analysis.plan
        plan = replace(plan, replaced=as_stored(subject.config, subject.source, plan.replaced))
    plan = replace(plan, source=plan.source or subject.identity, versions=plan.versions or software_versions())
    if not processes.is_main:
        return RunReport(str(output), plan, 0, None, seconds, analysis)
    expected = None
    if verify:
        assert sequences is not None
        decoder = subject.load()
        dtype, device = decoder.model.dtype, recipe.device_map or decoder.input_device
        expected = expected_logits(decoder, plan.removed, sequences.input_ids, plan.replaced)
        del decoder
    with atomic_folder(output, overwrite) as folder:
        with _timed(seconds, "export"):
            _export(subject, plan, folder, max_shard_size, progress)
            save_plan(plan, folder / PLAN_FILE_NAME)
            save_recipe(
                replace(recipe, model=subject.identity.name, revision=subject.revision), folder / RECIPE_FILE_NAME
            )
            write_model_card(folder / "README.md", plan)
        subject.release()
        verification = None
        if expected is not None:
            with _timed(seconds, "reload check"):
                verification = asdict(verify_checkpoint(folder, expected, dtype, device, subject.streamed))
        written = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    return RunReport(str(output), plan, written, verification, seconds, analysis)


def _recipe(
    recipe: Recipe | None, preset: str | None, calibration: CalibrationSet | str | None, settings: dict[str, Any]
) -> Recipe:
    if isinstance(calibration, CalibrationSet):  # it is what it is, whatever a recipe's defaults say
        samples, seq_len = calibration.input_ids.shape
        settings |= {"calibration": calibration.source, "samples": samples, "seq_len": seq_len}
    elif calibration is not None:
        settings["calibration"] = calibration
    return (recipe or Recipe()).with_changes(**preset_settings(preset)).with_changes(**settings)


def _check_placement(recipe: Recipe, processes: Processes) -> None:
    if processes.count > 1 and recipe.device_map not in (None, "cpu"):
        raise UserError(
            f"device_map {recipe.device_map!r} places one copy of the model, and each of {processes.count} processes needs "
            "its own: leave it out, or start one process"
        )


def open_subject(model: Any, recipe: Recipe, tokenizer: Any, criteria: Sequence[str] | None = None) -> Subject:
    """Opens a model for an analysis. Everything that can be known to be wrong before the weights are loaded is found here.

    Args:
        model: See `analyze`.
        recipe: The settings.
        tokenizer: See `analyze`.
        criteria: The criteria of the run; ``None`` means the recipe's.

    Raises:
        UserError: Something is wrong with the model or the settings.
    """
    recipes = [recipe] if criteria is None else [replace(recipe, criterion=name, options={}) for name in criteria]
    for each in recipes:
        check_criteria(each)
    if criteria is None:
        check_journal(recipe)
    subject = _open(model, recipe, tokenizer)
    check_compensation(recipe.compensate, get_adapter(subject.identity.model_type), subject.config, recipe.samples)
    for each in recipes:
        segments = each.num_segments if isinstance(each.num_segments, int) and is_segmented(each) else 1
        if segments > subject.num_layers:
            raise UserError(
                f"num_segments: {segments} segments are more than the model's {subject.num_layers} decoder layers"
            )
        check_budget(each.budget, subject.num_layers, (each.protect.first, each.protect.last), segments)
    longest = getattr(subject.config, "max_position_embeddings", None)
    if longest is not None and recipe.seq_len > longest:
        raise UserError(
            f"seq_len {recipe.seq_len} is longer than the {longest} positions that {subject.identity.name} has"
        )
    return subject


def _choose_engine(subject: Subject, recipe: Recipe, processes: Processes, on_forecast: OnForecast | None) -> None:
    """Makes the subject a streamed one where the recipe says so, or where ``auto`` finds that the whole model does not fit.

    All processes take the same engine: they meet in sums whose order is the engine's.

    Raises:
        UserError: The model cannot be streamed, or the scratch folder is none.
    """
    # A forecast runs the model's code once without contents: only where it is shown, or decides.
    found = None if on_forecast is None else forecast(subject, recipe)
    wanted = chosen_engine(subject, recipe) if found is None else found[0].engine
    votes = float(processes.sum(torch.tensor(float(wanted == "streamed"), dtype=torch.float64)))
    if votes > 0:
        subject.stream(recipe.scratch)
    if on_forecast is not None and found is not None:
        on_forecast(*found)


def _open(model: Any, recipe: Recipe, tokenizer: Any) -> Subject:
    return Subject(model, recipe.revision, recipe.dtype, recipe.device_map, tokenizer)


def read_calibration(subject: Subject, recipe: Recipe, given: CalibrationSet | str | None) -> CalibrationSet:
    """The calibration set that was given, or the one that the recipe names.

    Raises:
        UserError: The text cannot be read, there is too little of it, or its tokens are not the model's.
    """
    if not isinstance(given, CalibrationSet):
        check_spec(recipe.calibration)
        given = calibration_set(
            subject.tokenizer, recipe.calibration, samples=recipe.samples, seq_len=recipe.seq_len, seed=recipe.seed
        )
    subject.check_tokens(given.input_ids)
    return given


def _enough_for_the_check(recipe: Recipe, subject: Subject) -> Recipe:
    """Settings that read no more text than the reload check looks at, in sequences that the model has positions for."""
    longest = getattr(subject.config, "max_position_embeddings", None) or CHECK_TOKENS
    return replace(recipe, samples=CHECK_SEQUENCES, seq_len=min(recipe.seq_len, CHECK_TOKENS, longest))


def _export(subject: Subject, plan: PrunePlan, folder: Path, max_shard_size: int | None, progress: Progress) -> None:
    if subject.source is not None and subject.source.format == "safetensors":
        export_from_files(subject.source, plan, folder, max_shard_size, progress)
        return
    export_from_model(drop_layers(subject.load().model, plan), folder, max_shard_size)
    if subject.source is not None and subject.source.format == "bin":
        carry_over_files(subject.source.path, folder)
    else:
        subject.save_tokenizer(folder)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = round(time.perf_counter() - start, 3)
