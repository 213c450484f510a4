"""Merges a PEFT adapter into its base model, so that what it has learned can be pruned."""

from __future__ import annotations

from pathlib import Path

from sglp_llm.checkpoint import atomic_folder, check_output
from sglp_llm.checkpoint.export import carry_over
from sglp_llm.errors import UserError
from sglp_llm.models import find_source
from sglp_llm.models.loading import load_model, refuse_quantised
from sglp_llm.small_files import read_json

_CONFIG = "adapter_config.json"


def merge_adapter(adapter: str | Path, output: str | Path, overwrite: bool = False) -> Path:
    """Writes the model that an adapter makes of its base model, as a plain checkpoint.

    Args:
        adapter: Folder of a PEFT adapter; its configuration names the base model.
        output: Folder to write. The base's tokenizer and other files are carried over, or the adapter's where it has them.
        overwrite: Replace an existing output.

    Returns:
        The folder.

    Raises:
        UserError: It is no adapter that can be merged, its base model cannot be pruned, or the output exists.
    """
    folder, output = Path(adapter).expanduser(), Path(output).expanduser()
    check_output(output, overwrite)
    try:
        settings = read_json(folder / _CONFIG, "adapter's configuration")
        base, revision = settings["base_model_name_or_path"], settings.get("revision")
    except (OSError, UserError, KeyError, TypeError) as error:
        raise UserError(
            f"{adapter}: not the folder of a PEFT adapter: {_CONFIG} must name its base model ({type(error).__name__})"
        ) from None
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{folder / _CONFIG}: base_model_name_or_path must name the model that the adapter was trained on"
        )
    source = find_source(base, revision if not Path(base).exists() else None)
    source.check_apart(output)
    refuse_quantised(source, "merging an adapter")
    try:
        from peft import PeftModel
    except ModuleNotFoundError:
        raise UserError("merging an adapter needs the package peft: pip install 'sglp-llm[heal]'") from None
    model = load_model(source).model
    try:
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
    except Exception as error:  # peft, torch and safetensors each have their own for what does not fit
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"{adapter}: peft cannot merge it into {base} ({reason})") from None
    with atomic_folder(output, overwrite) as made:
        merged.save_pretrained(made)
        for each in (source.path, folder):
            if each.is_dir():
                carry_over(each, made)
    return output
