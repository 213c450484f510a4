"""The two main functions: `analyze` makes a plan, `prune` makes a plan and writes the shortened checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglp_llm.adapters import auto_class, is_wrapper
from sglp_llm.analysis import open_for_analysis, run_analysis, software_versions
from sglp_llm.analysis.decisions import Judge
from sglp_llm.analysis.latency import drop_for_latency
from sglp_llm.analysis.opening import Inputs, OnForecast, give_back, let_go, open_for_plan
from sglp_llm.analysis.run import only_journal
from sglp_llm.calibration import CalibrationSet, named_text
from sglp_llm.checkpoint import atomic_folder, remove_folder
from sglp_llm.checkpoint.export import carry_over as carry_over_files
from sglp_llm.checkpoint.export import drop_layers, export_from_files, export_from_model
from sglp_llm.checkpoint.gguf_file import check_gguf_source, check_shortened_output, export_gguf, gguf_config, is_gguf
from sglp_llm.checkpoint.lock import lock_beside, only_run
from sglp_llm.checkpoint.publish_file import atomic_file
from sglp_llm.checkpoint.replaced import as_stored
from sglp_llm.checkpoint.verify import expected_logits, verify_checkpoint
from sglp_llm.errors import UserError
from sglp_llm.evaluation.judge import open_judge
from sglp_llm.evaluation.latency import measure_decode
from sglp_llm.healing.heal import check_healing, check_training_text, heal
from sglp_llm.healing.preparing import work_folder_of
from sglp_llm.healing.reading import NotTrained
from sglp_llm.models.opened import OpenedModel
from sglp_llm.plan import (
    PLAN_FILE_NAME,
    RECIPE_FILE_NAME,
    Recipe,
    preset_or_default,
    preset_settings,
    save_plan,
    save_recipe,
)
from sglp_llm.plan.shipped import DEFAULT_PRESET, UNCHANGED_PRESET, UNTRAINED_PRESET
from sglp_llm.processes import ALONE, Processes
from sglp_llm.progress import Progress, silent, timed
from sglp_llm.records import Analysis, PrunePlan, RunReport
from sglp_llm.report.html import write_report
from sglp_llm.report.model_card import write_model_card
from sglp_llm.sizes import parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        recipe: The settings. Without a recipe, a preset, a criterion and a compensation, the preset is ``fast``; ``closed-form``
            for a live model or token ids, which cannot be trained with. Where no budget is given, it is a quarter of the layers.
        preset: A named combination of criterion, compensation and training, from ``sglp-llm ls presets``; overrides the recipe.
        tokenizer: Needed with a live model, unless ``calibration`` holds token ids.
        calibration: The calibration set, or where to read it (``"wikitext2"``, ``"text:FILE"``, ``"pydoc"``, ...).
        progress: Reports finished sequences.
        processes: The processes that share the sequences (`current_processes`); all return the same result.
        on_forecast: See `OnForecast`.
        **settings: Single settings that override the recipe and the preset: ``ratio=0.25``, ``criterion="bi"``, ...

    Raises:
        UserError: Something in the model, the text or the settings is wrong; one line says what.
    """
    with processes.failing_together():
        recipe = _with_text(_recipe(model, recipe, preset, calibration, settings))
        if not recipe.budget.to_dict():
            recipe = replace(recipe, ratio=0.25)
        found = open_for_analysis(
            model, recipe, tokenizer, calibration, processes=processes, on_forecast=on_forecast, progress=progress
        )
        return _analysed(found, recipe, progress, processes)


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
    """Removes decoder layers, trains what is left where the recipe says so, and writes the shortened checkpoint.

    The output appears complete or not at all. A live model is shortened in place, as by `drop_layers`. With several processes
    only the main one writes; the others return after the analysis.

    Args:
        model: Hub id, folder, ``.gguf`` file, or a live transformers model.
        output: Folder to write; or, where the model is a GGUF file, a ``.gguf`` file: nothing is trained or compensated then.
        plan: Skips the analysis; ``recipe``'s budget and criterion are then not used. The replaced weights of a compensated plan
            are written.
        recipe: See `analyze`; it must hold a budget unless there is a plan.
        preset: See `analyze`.
        tokenizer: See `analyze`.
        calibration: See `analyze`; with a plan it is only read for the reload check (default: ``"pydoc"``).
        overwrite: Replace an existing output.
        verify: Reload the result with plain transformers and compare it with the source model, removed layers skipped.
        progress: Reports finished sequences and written bytes.
        processes: See `analyze`.
        on_forecast: See `OnForecast`.
        **settings: See `analyze`.

    Raises:
        UserError: See `analyze`; also an output that exists, is inside the source or is written by another run, a plan for
            another model, a full disk, or files of the model that have changed meanwhile.
        VerificationError: The reload check failed; nothing is left at ``output``.
    """
    output = Path(output).expanduser()
    with ExitStack() as held:
        with processes.failing_together():
            serves = plan is not None and calibration is None and recipe is None
            recipe = _recipe(
                model,
                recipe or (Recipe() if plan is not None else None),
                preset,
                calibration,
                settings,
                is_gguf(output),
            )
            if serves and recipe.healing is None:
                # Any text serves for the reload check, and this one needs no network.
                recipe = recipe.with_changes(calibration="pydoc")
                calibration = "pydoc"
            recipe = _with_text(recipe)
            check_shortened_output(output, overwrite)
            if is_gguf(output):
                check_gguf_source(model, output)
                _check_unchanged(recipe, output)
            if processes.is_main:
                held.enter_context(only_run(lock_beside(output), output))
            healing = recipe.healing
            if healing is not None:
                check_healing(healing, processes)
                if isinstance(model, torch.nn.Module):
                    raise UserError(
                        "heal needs the original, and a live model is shortened in place: save it, and give the folder"
                    )
        if healing is None:
            return _prune(
                model, output, plan, recipe, tokenizer, calibration, overwrite, verify, progress, processes, on_forecast
            )
        # What is pruned is the student; it is gone when the result is written.
        student = output.with_name(f"{output.name}.pruned")
        report = _prune(
            model, student, plan, recipe, tokenizer, calibration, True, False, progress, processes, on_forecast
        )
        processes.wait()  # the main process has written what all train
        give_back()  # how it is trained depends on what is free
        try:
            healed = heal(
                student,
                output,
                recipe=healing,
                tokenizer=tokenizer,
                overwrite=overwrite,
                verify=verify,
                resume=work_folder_of(output).exists(),
                progress=progress,
                processes=processes,
            )
        except NotTrained as reason:
            plan = report.plan
            untrained = _prune(
                model, output, plan, recipe, tokenizer, calibration, overwrite, verify, progress, processes, None
            )
            report = replace(untrained, analysis=report.analysis, seconds={**report.seconds, **untrained.seconds})
            report = replace(report, notes=(f"not trained: {reason}",))
        else:
            report = replace(report, output=str(output), bytes_written=healed.bytes_written, healing=healed)
        if processes.is_main:
            remove_folder(student, output)
        return report


def _prune(
    model: str | Path | PreTrainedModel,
    output: Path,
    plan: PrunePlan | None,
    recipe: Recipe,
    tokenizer: Any,
    calibration: CalibrationSet | str | None,
    overwrite: bool,
    verify: bool,
    progress: Progress,
    processes: Processes,
    on_forecast: OnForecast | None,
) -> RunReport:
    """See `prune`; without training."""
    seconds: dict[str, float] = {}
    analysis = None
    with processes.failing_together():
        max_shard_size = None if recipe.max_shard_size is None else parse_bytes(recipe.max_shard_size)
        if plan is not None:
            found = open_for_plan(
                model,
                recipe,
                plan,
                tokenizer,
                calibration,
                output=output,
                verify=verify,
                processes=processes,
                progress=progress,
            )
        elif recipe.budget.to_dict():
            found = open_for_analysis(
                model,
                recipe,
                tokenizer,
                calibration,
                output=output,
                processes=processes,
                on_forecast=on_forecast,
                progress=progress,
            )
        else:
            raise UserError("how much to remove? Give a ratio, a number of layers to drop, a target, or a plan")
        if recipe.healing is not None:
            check_training_text(recipe.healing, found.model.tokenizer)
        if plan is None:
            with timed(seconds, "analysis"):
                analysis = _analysed(found, recipe, progress, processes)
            plan = analysis.plan
        opened = found.model
        plan = replace(plan, replaced=as_stored(opened.config, opened.source, plan.replaced))
    notes: list[str] = []
    quantised = opened.source.quantised if opened.source is not None else ""
    made_for = plan.source or opened.identity
    is_same = made_for.fingerprint == opened.identity.fingerprint
    if not is_same and opened.source is not None and opened.source.format != "gguf":
        notes.append(f"the plan was made for {made_for.name}, which has other tensors or settings")
        plan = replace(plan, source=opened.identity, revision=opened.revision)  # a teacher is the sibling itself
    if opened.source is not None and (count := opened.source.predictor_layers):
        notes.append(
            f"left out: {count} stored behind the decoder layers, for multi-token prediction from the last of them"
        )
    if verify and quantised and analysis is None:
        verify = False
        notes.append(f"no reload check: {quantised} weights are copied as they are, and not run")
    plan = replace(plan, source=plan.source or opened.identity, versions=plan.versions or software_versions())
    if opened.adapter.is_derived:  # the result is there only if the reload check passes
        special = {"adapter": f"derived{', verified by logits' if verify else ''}"}
        if is_wrapper(opened.config):
            special["loaded_by"] = auto_class(opened.config).__name__
        plan = replace(plan, settings={**plan.settings, **special})
    if not processes.is_main:
        return RunReport(str(output), plan, 0, None, seconds, analysis)
    expected = None
    if verify:
        assert found.calibration is not None
        with opened.unchanged_files():
            decoder = opened.load()
            dtype, device = decoder.model.dtype, recipe.device_map or decoder.input_device
            expected = expected_logits(decoder, plan.removed, found.calibration.input_ids, plan.replaced)
            del decoder
    verification = None
    if is_gguf(output):
        assert opened.source is not None
        with atomic_file(output, overwrite) as file, opened.unchanged_files():
            with timed(seconds, "export"):
                said = export_gguf(opened.source, plan, file, progress)
            opened.release()
            if expected is not None:
                config = gguf_config(opened.source, plan) if said else None
                with timed(seconds, "reload check"):
                    verification = asdict(verify_checkpoint(file, expected, dtype, device, config=config))
            written = file.stat().st_size
        return RunReport(str(output), plan, written, verification, seconds, analysis, notes=(*notes, *said))
    with atomic_folder(output, overwrite) as folder, opened.unchanged_files():
        with timed(seconds, "export"):
            # Before the weights: what is wrong with a plan from elsewhere is seen here at the latest.
            save_plan(plan, folder / PLAN_FILE_NAME)
            save_recipe(
                replace(recipe, model=opened.identity.name, revision=opened.revision), folder / RECIPE_FILE_NAME
            )
            write_model_card(folder / "README.md", plan, opened.card)
            write_report(folder)
            _export(opened, plan, folder, max_shard_size, progress)
        opened.release()
        if expected is not None:
            with timed(seconds, "reload check"):
                verification = asdict(verify_checkpoint(folder, expected, dtype, device, opened.streamed))
        written = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    return RunReport(str(output), plan, written, verification, seconds, analysis, notes=tuple(notes))


def _analysed(found: Inputs, recipe: Recipe, progress: Progress, processes: Processes) -> Analysis:
    """The analysis; for a target of decode time after this has been measured, and become a number of layers."""
    with found.model.unchanged_files(), only_journal(recipe, processes):
        judge = open_judge(recipe, found.model)
        if recipe.target_latency is None:
            return _on_some_engine(found, recipe, progress, processes, judge)
        times = measure_decode(found.model, progress, processes)
        drop = drop_for_latency(recipe, times, found.model.staying)
        analysis = _on_some_engine(found, recipe.with_changes(drop=drop), progress, processes, judge)
    settings = {**analysis.plan.settings, "decode_times": times.to_dict()}
    return replace(analysis, plan=replace(analysis.plan, budget=recipe.budget.to_dict(), settings=settings))


def _on_some_engine(
    found: Inputs, recipe: Recipe, progress: Progress, processes: Processes, judge: Judge | None
) -> Analysis:
    """The analysis; where the engine was left open and the device runs out of memory, once more with streamed layers.

    Not with several processes, of which others may wait for this one.
    """
    opened = found.model
    try:
        return run_analysis(found, recipe, progress, processes, judge)
    except torch.OutOfMemoryError:
        if recipe.engine != "auto" or opened.streamed or processes.count > 1 or not opened.can_stream:
            raise
    let_go(opened)  # outside the handler: the error holds the frames, and they hold tensors
    opened.stream(recipe.scratch)
    opened.state_bytes = 0  # the prediction was too small: nothing is kept there that need not be
    return run_analysis(replace(found, step=1), recipe, progress, processes, judge)


def _recipe(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None,
    preset: str | None,
    calibration: CalibrationSet | str | None,
    settings: dict[str, Any],
    unchanged: bool = False,
) -> Recipe:
    if recipe is None:
        # A live model is shortened in place, and is no teacher then; token ids are no text to read on in.
        trainable = not isinstance(model, torch.nn.Module) and not isinstance(calibration, CalibrationSet)
        default = UNCHANGED_PRESET if unchanged else DEFAULT_PRESET if trainable else UNTRAINED_PRESET
        preset = preset_or_default(preset, settings, default)
    if isinstance(calibration, CalibrationSet):  # its own size is recorded, not the recipe's
        samples, seq_len = calibration.input_ids.shape
        settings |= {"calibration": calibration.source, "samples": samples, "seq_len": seq_len}
    elif calibration is not None:
        settings["calibration"] = calibration
    return (recipe or Recipe()).with_changes(**preset_settings(preset)).with_changes(**settings)


def _check_unchanged(recipe: Recipe, output: Path) -> None:
    """Refuses what a GGUF file cannot take up."""
    changing = {
        "heal": recipe.healing is not None,
        "compensate": recipe.compensate != "none",
        "max_shard_size": recipe.max_shard_size is not None,
    }
    if given := [name for name, is_given in changing.items() if is_given]:
        raise UserError(
            f"{output}: a GGUF file keeps the weights of the kept layers as they are, in one file: leave out {given[0]} "
            f"(the preset {UNCHANGED_PRESET} changes no weights), or write a folder"
        )


def _with_text(recipe: Recipe) -> Recipe:
    return replace(recipe, calibration=named_text(recipe.calibration))


def _export(opened: OpenedModel, plan: PrunePlan, folder: Path, max_shard_size: int | None, progress: Progress) -> None:
    if opened.source is not None and opened.source.format == "safetensors":
        export_from_files(opened.source, plan, folder, max_shard_size, progress)
        return
    export_from_model(drop_layers(opened.load().model, plan), folder, max_shard_size)
    if opened.source is not None and opened.source.format == "bin":
        carry_over_files(opened.source.path, folder)
    else:
        opened.save_tokenizer(folder)
