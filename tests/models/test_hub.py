"""The Hub, with its network calls replaced by what they raise and return in real life."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoints import QUICK, Outcome, copied, run_cli, save_tiny, written
from huggingface_hub import errors

from sglp_llm.plan import save_plan
from sglp_llm.records import PrunePlan

# Whichever HTTP library this release of huggingface_hub uses.
httpx: Any = import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
REQUEST = httpx.Request("GET", "https://huggingface.co/api/models/owner/name")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny")


def answered(error: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    text = f"{status} Client Error. (Request ID: 1)\n\nRepository not found for url: {REQUEST.url}.\nRead the docs."
    return error(text, response=httpx.Response(status, request=REQUEST))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answered(errors.RepositoryNotFoundError, 404), "owner/name: the Hub has no such model (or it is private"),
        (answered(errors.GatedRepoError, 403), "owner/name: the model is gated; accept its terms"),
        (answered(errors.RevisionNotFoundError, 404), "owner/name: the Hub has the model but no revision 'v9'"),
        (answered(errors.HfHubHTTPError, 500), "cannot be had from the Hub (500 Client Error."),
        (errors.LocalEntryNotFoundError("Cannot find it.\nCheck your connection."), "(Cannot find it.)"),
        (errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set"), "(HF_HUB_OFFLINE is set)"),
        (httpx.ConnectError("Name or service not known"), "(Name or service not known)"),
        (httpx.ReadTimeout(""), "(ReadTimeout)"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failed_download(error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    outcome = run_cli("prune", "owner/name", "--revision", "v9", "-o", tmp_path / "new" / "out", "--drop", 1)
    assert outcome.code == 2, outcome
    assert message in outcome.error
    assert "owner/name" in outcome.error
    assert list(tmp_path.iterdir()) == []


class Hub:
    """Stands in for ``snapshot_download``: a cache folder named after the commit, and a record of what was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo: str, **options: Any) -> str:
        self.calls.append({"repo": repo, **options})
        return str(self.folder)


def test_download_by_name_and_revision(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = Hub(copied(tiny, tmp_path / commit))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.chdir(tmp_path)
    outcome = run_cli("prune", "owner/name", "--revision", "v1", "-o", "out", "--drop", 1, *QUICK, "--no-verify")
    assert outcome.code == 0, outcome
    assert [(call["repo"], call["revision"]) for call in hub.calls] == [("owner/name", "v1")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: owner/name\n" in card
    assert "https://huggingface.co/owner/name" in card
    assert f'"revision": "{commit}"' in (tmp_path / "out" / "sglp_plan.json").read_text()
    assert f"revision: {commit}\n" in (tmp_path / "out" / "sglp_recipe.yaml").read_text()


def test_weights_in_bin_files_are_fetched_only_where_there_are_no_others(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(copied(tiny, tmp_path / "commit", lambda folder: (folder / "model.safetensors").unlink()))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    outcome = run_cli("analyze", "owner/name", *QUICK)
    assert outcome.code == 2
    assert "no weights: expected model.safetensors" in outcome.error
    first, second = ([pattern for pattern in call["allow_patterns"] if "model" in pattern] for call in hub.calls)
    assert "model*.safetensors" in first
    assert "pytorch_model*.bin" not in first
    assert "pytorch_model*.bin" in second


def test_a_folder_here_comes_before_the_hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tiny)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    copied(tiny, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert run_cli("analyze", "owner/name", *QUICK).code == 0
    assert hub.calls == []


class Uploads:
    """Stands in for the network calls of ``HfApi``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

        def create_repo(_: Any, repo_id: str, **options: Any) -> str:
            self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(_: Any, **options: Any) -> None:
            files = sorted(path.name for path in Path(options["folder_path"]).iterdir())
            self.calls.append(("upload_folder", {**options, "files": files}))
            if error is not None:
                raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)


def push(tiny: Path, output: Path, *options: str) -> Outcome:
    return run_cli(
        "prune", tiny, "-o", output, "--drop", 1, *QUICK, "--no-verify", "--push-to-hub", "me/short", *options
    )


@pytest.mark.parametrize("private", [False, True])
def test_upload(private: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads(monkeypatch)
    outcome = push(tiny, tmp_path / "out", *(["--private"] if private else []))
    assert outcome.code == 0, outcome
    assert outcome.out.endswith("Uploaded          https://huggingface.co/me/short\n")
    (first, created), (second, uploaded) = uploads.calls
    assert (first, second) == ("create_repo", "upload_folder")
    assert created == {"repo_id": "me/short", "private": True if private else None, "exist_ok": True}
    assert (uploaded["repo_id"], Path(uploaded["folder_path"])) == ("me/short", tmp_path / "out")
    assert {"README.md", "config.json", "model.safetensors", "sglp_plan.json"} <= set(uploaded["files"])


def test_upload_takes_the_plans_tensors_along(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads(monkeypatch)
    new = {"model.layers.0.input_layernorm.weight": torch.ones(32)}
    save_plan(PrunePlan(6, (0, 1, 2, 3), replaced=new), tmp_path / "mine.json")
    options = ("--plan", tmp_path / "mine.json", "--no-verify", "--push-to-hub", "me/short")
    outcome = run_cli("prune", tiny, "-o", tmp_path / "out", *options)
    assert outcome.code == 0, outcome
    assert {"sglp_plan.json", "sglp_plan.tensors"} <= set(uploads.calls[1][1]["files"])


@pytest.mark.parametrize(
    "error",
    [answered(errors.HfHubHTTPError, 401), httpx.ConnectError("no route\nto host"), ValueError("odd"), OSError("gone")],
    ids=lambda error: type(error).__name__,
)
def test_failed_upload_leaves_the_result_and_says_how_to_go_on(
    error: Exception, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Uploads(monkeypatch, error)
    output = tmp_path / "out"
    outcome = push(tiny, output)
    assert outcome.code == 1, outcome
    line = outcome.err.splitlines()[-1]
    assert line.startswith(f"sglp-llm: error: {output} is complete, but the upload failed ({str(error).split()[0]}")
    assert line.endswith(f"retry with: hf upload me/short {output} .")
    assert "Uploaded" not in outcome.out
    again = run_cli("prune", tiny, "-o", tmp_path / "again", "--plan", output, "--no-verify")
    assert again.code == 0, again
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_retry_command_is_for_the_shell_and_keeps_the_repository_private(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Uploads(monkeypatch, OSError("gone"))
    outcome = push(tiny, tmp_path / "my model", "--private")
    assert outcome.code == 1
    assert outcome.err.endswith(f"retry with: hf upload me/short '{tmp_path}/my model' . --private\n")


def test_upload_of_json_output_keeps_stdout_to_one_object(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Uploads(monkeypatch)
    outcome = push(tiny, tmp_path / "out", "--json")
    assert outcome.code == 0
    assert outcome.out.startswith("{")
    assert outcome.out.endswith("}\n")
    assert "Uploaded          https://huggingface.co/me/short" in outcome.err


def test_nothing_is_asked_of_the_hub_without_a_reason(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Uploads(monkeypatch)
    source = copied(tiny, tmp_path / "source", written("config.json", "{"))
    assert push(source, tmp_path / "out").code == 2
    assert uploads.calls == []
