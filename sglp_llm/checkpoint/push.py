"""Publishes a finished folder on the Hugging Face Hub, without the paths of the machine that made it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglp_llm.errors import UserError
from sglp_llm.models.upload import Notify, Upload, UploadError, check_repository, check_revision, full_name, upload
from sglp_llm.plan import PLAN_FILE_NAME, RECIPE_FILE_NAME
from sglp_llm.plan.healing_recipe import HEALING_FILE_NAME, HEALING_RECIPE_FILE_NAME
from sglp_llm.plan.plans import plan_text
from sglp_llm.plan.published import PLACE, last_part, published_model, without_local_paths
from sglp_llm.plan.results import RESULTS_FILE_NAME
from sglp_llm.plan.yaml_files import dump_yaml, read_yaml
from sglp_llm.small_files import check_own, read_json, read_text

MESSAGE = "Upload a model pruned with sglp-llm"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Of an earlier upload: another sharding's files beside the new ones would be loaded with them, or instead.
_REPLACED = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*", "sglp_*")
_RECIPES = (RECIPE_FILE_NAME, HEALING_RECIPE_FILE_NAME)
# The configuration of a model, a tokenizer or an adapter may say where it was loaded from.
_CONFIGURATIONS = re.compile(r"(.*_)?config\.json|special_tokens_map\.json")
_FILE_KEYS = re.compile(r"_(file|path)$")
_PATH = re.compile(r"(~|\.{1,2})?/")


def push(
    folder: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
    notify: Notify = lambda _: None,
) -> Upload:
    """Uploads a checkpoint that `prune` or `heal` has written, in one commit; the repository is created where it is needed.

    The folder stays as it is. In what is uploaded, the plan, the recipes and the configurations name no path of this machine, and
    the model card's commands name the repository. Hidden files stay here. Weights and plans of an earlier upload that
    the folder does not hold are removed from the branch. See `upload` for what is tried again.

    Args:
        folder: The checkpoint.
        repo: ``OWNER/NAME``, or ``NAME`` of the user's own.
        revision: A branch, created where it is needed; none = the main one.
        private: Create the repository private.
        message: Of the commit.
        notify: Is told in one line why and when it will be tried again.

    Raises:
        UserError: The folder is no checkpoint, the name cannot be one, or nobody is logged in.
        UploadError: The upload failed; the folder is whole. The message says how to try again.
    """
    folder = Path(folder).expanduser()
    check_repository(repo)
    check_revision(revision)
    if not (folder / "config.json").is_file() or not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise UserError(
            f"{folder}: no checkpoint here (config.json and weights): give a folder that prune or heal wrote"
        )
    try:
        repo = full_name(repo)
        return upload(
            published_files(folder, repo),
            repo,
            revision=revision,
            private=private,
            message=message or MESSAGE,
            replaced=_REPLACED,
            notify=notify,
        )
    except UploadError as error:
        retry = ["sglp-llm", "push", str(folder), repo, *([] if revision is None else ["--revision", revision])]
        retry += [*(["--private"] if private else []), *([] if message is None else ["--message", message])]
        raise UploadError(
            f"{folder} is complete, but the upload failed ({error}); retry with: {shlex.join(retry)}"
        ) from error


def published_files(folder: Path, repo: str) -> dict[str, Path | bytes]:
    """The content of each file as it is published, by its path in the repository.

    Raises:
        UserError: A plan, a recipe or a configuration cannot be read; or there is a link out of the folder, or a pipe.
    """
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        # peft's card of an adapter: its base model is the path that it was loaded from.
        if hidden or name == "adapter/README.md" or (path.is_dir() and not path.is_symlink()):
            continue
        check_own(path, folder)
        files[name] = _published(path, name, repo)
    return files


def _published(path: Path, name: str, repo: str) -> Path | bytes:
    """The file, or its new content where it must not be published as it is."""
    if name == "README.md":
        return _with_name(path, repo)
    if name in _RECIPES:
        data = read_yaml(path, "recipe")
        public = without_local_paths(data)
        return path if public == data else dump_yaml(public).encode()
    if name in (PLAN_FILE_NAME, HEALING_FILE_NAME, RESULTS_FILE_NAME):
        data = read_json(path, "plan" if name == PLAN_FILE_NAME else "record")
        public = without_local_paths(data)
        if public == data:
            return path
        return (plan_text(public) if name == PLAN_FILE_NAME else json.dumps(public, indent=2) + "\n").encode()
    if _CONFIGURATIONS.fullmatch(path.name):
        data = read_json(path, "configuration")
        public = _without_origins(data)
        return path if public == data else (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()
    return path


def _with_name(card: Path, repo: str) -> Path | bytes:
    text = read_text(card, "model card")
    return text.replace(PLACE, repo).encode() if PLACE in text else card


def _without_origins(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _without_origins(each, str(name)) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_origins(each, key) for each in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    if key.endswith("name_or_path"):
        return published_model(value)
    return last_part(value) if _FILE_KEYS.search(key) and _PATH.match(value) else value
