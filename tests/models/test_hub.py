"""Checkpoints read from a Hub on this machine; errors that it does not make are raised as they are in real life."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from checkpoints import QUICK, copied, logits, logits_of, run_cli, save_tiny, tiny_model, without, written
from helpers import tiny_tokenizer
from huggingface_hub import ModelCard, errors
from local_hub import LocalHub, Repository, Stored
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglp_llm.models.hub import download
from sglp_llm.plan import load_plan, save_plan
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


def served(hub: LocalHub, folder: Path, name: str = "owner/name", private: bool = False, **more: bytes) -> Repository:
    """Puts a folder, and more files, on the Hub."""
    repository = hub.repositories[name] = Repository(private)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()} | more
    files = {path: Stored(content, b"\0" in content) for path, content in contents.items()}
    hub.objects |= {each.oid: each.content for each in files.values() if each.lfs}
    repository.add("main", files, "first")
    return repository


def fetched(hub: LocalHub) -> set[str]:
    """The names of the files whose content, or address of the content, was asked for."""
    return {request.rpartition("/")[2] for request in hub.asked("^GET .*/resolve/")}


def test_download_by_name_and_revision(tiny: Path, tmp_path: Path, hub: LocalHub) -> None:
    repository = served(hub, tiny)
    commit = repository.branches["v1"] = repository.branches["main"]
    repository.add("main", {}, "nothing is left")
    outcome = run_cli("prune", "owner/name", "--revision", "v1", "-o", tmp_path / "out", "--drop", 1, *QUICK)
    assert outcome.code == 0, outcome
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: owner/name\n" in card
    assert "https://huggingface.co/owner/name" in card
    assert f'"revision": "{commit}"' in (tmp_path / "out" / "sglp_plan.json").read_text()
    assert f"revision: {commit}\n" in (tmp_path / "out" / "sglp_recipe.yaml").read_text()
    hub.requests.clear()
    again = run_cli("prune", "owner/name", "--revision", commit, "-o", tmp_path / "again", "--drop", 1, *QUICK)
    assert again.code == 0, again
    assert hub.asked("(GET|HEAD) .*/(resolve|objects)/") == []


def test_only_what_is_needed_is_fetched(tiny: Path, tmp_path: Path, hub: LocalHub) -> None:
    card = b"---\nlicense: mit\nlanguage: en\n---\n# Its card\n"
    others = [
        "model.fp16.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "consolidated.safetensors",
        "onnx/config.json",
    ]
    others += ["pytorch_model.bin", "tf_model.h5", "report.html", "loss.png", "train_log.jsonl", "original/params.json"]
    served(hub, tiny, **{"README.md": card}, **dict.fromkeys(others, b"\0"))
    outcome = run_cli("prune", "owner/name", "-o", tmp_path / "out", "--drop", 1, *QUICK)
    assert outcome.code == 0, outcome
    assert fetched(hub) <= {path.name for path in tiny.iterdir()} | {"README.md"}
    assert len(hub.asked("^GET /objects/")) == 1
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.license, data.language) == ("mit", "en")


def test_the_configuration_alone_for_a_prediction(tiny: Path, hub: LocalHub) -> None:
    served(hub, tiny)
    assert run_cli("plan-memory", "owner/name").code == 0
    assert fetched(hub) == {"config.json"}


def test_weights_in_bin_files_are_fetched_only_where_there_are_no_others(
    tiny: Path, tmp_path: Path, hub: LocalHub
) -> None:
    bins = copied(tiny, tmp_path / "bins", without("model.safetensors"))
    torch.save(tiny_model().state_dict(), bins / "pytorch_model.bin")
    served(hub, bins)
    outcome = run_cli("prune", "owner/name", "-o", tmp_path / "out", "--drop", 1, *QUICK)
    assert outcome.code == 0, outcome
    removed = load_plan(tmp_path / "out").removed
    assert logits(tmp_path / "out").equal(logits(tiny, skip=removed))


def test_a_download_that_breaks_off_goes_on_where_it_was(
    tiny: Path, tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    served(hub, tiny)
    (weights,) = hub.objects
    hub.cut[weights] = 10_000
    outcome = run_cli("prune", "owner/name", "-o", tmp_path / "out", "--drop", 1, *QUICK)
    assert outcome.code == 0, outcome
    assert hub.ranges == ["bytes=10000-"]
    assert len(hub.asked(f"^GET /objects/{weights}")) == 2
    expected = run_cli("prune", tiny, "-o", tmp_path / "expected", "--drop", 1, *QUICK)
    assert expected.code == 0, expected
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "expected" / "model.safetensors"
    ).read_bytes()


def test_an_interrupted_download_keeps_the_files_that_are_whole(tmp_path: Path, hub: LocalHub) -> None:
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    tiny_tokenizer(bos=True).save_pretrained(tmp_path / "sharded")
    served(hub, tmp_path / "sharded")
    last = list(hub.objects)[-1]
    hub.fail(f"GET /objects/{last}", 403, times=1)
    command = ("prune", "owner/name", "-o", tmp_path / "out", "--drop", 1, *QUICK)
    assert "owner/name: no such folder or file here, and it cannot be had from the Hub (403" in run_cli(*command).error
    hub.requests.clear()
    outcome = run_cli(*command)
    assert outcome.code == 0, outcome
    assert hub.asked("^GET /objects/") == [f"GET /objects/{last}"]


def test_a_private_model_needs_the_login(
    tiny: Path, tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(hub, tiny, private=True)
    assert run_cli("prune", "owner/name", "-o", tmp_path / "out", "--drop", 1, *QUICK).code == 0
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    error = run_cli("prune", "owner/name", "-o", tmp_path / "new", "--drop", 1, *QUICK).error
    assert "the Hub has no such model (or it is private: log in with `hf auth login`)" in error


def test_a_folder_here_comes_before_the_hub(
    tiny: Path, tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(tiny, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert run_cli("analyze", "owner/name", *QUICK).code == 0
    assert hub.requests == []


def test_a_compensated_model_comes_with_the_tensors_of_its_plan(tiny: Path, tmp_path: Path, hub: LocalHub) -> None:
    new = {"model.layers.0.input_layernorm.weight": torch.ones(32)}
    save_plan(PrunePlan(6, (0, 1, 2, 3), replaced=new), tmp_path / "mine.json")
    options = ("--plan", tmp_path / "mine.json", "--no-verify", "--push-to-hub", "me/short")
    outcome = run_cli("prune", tiny, "-o", tmp_path / "out", *options)
    assert outcome.code == 0, outcome
    folder, _ = download("me/short", None)
    assert load_plan(folder).replaced.keys() == new.keys()


def test_pushed_pruned_from_there_and_loaded_by_plain_transformers(tmp_path: Path, hub: LocalHub) -> None:
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    tiny_tokenizer(bos=True).save_pretrained(tmp_path / "sharded")
    options = (*QUICK, "--drop", 1, "--push-to-hub")
    assert run_cli("prune", tmp_path / "sharded", "-o", tmp_path / "five", *options, "me/five").code == 0
    outcome = run_cli("prune", "me/five", "-o", tmp_path / "four", *options, "me/four")
    assert outcome.code == 0, outcome
    assert len([path for path in hub.repositories["me/four"].files() if path.endswith(".safetensors")]) > 1
    loaded = AutoModelForCausalLM.from_pretrained("me/four", cache_dir=tmp_path / "third-cache").eval()
    removed = load_plan(tmp_path / "four").removed
    assert logits_of(loaded).equal(logits(tmp_path / "five", skip=removed))
    tokenizer = AutoTokenizer.from_pretrained("me/four", cache_dir=tmp_path / "third-cache")
    assert tokenizer("the end").input_ids == tiny_tokenizer(bos=True)("the end").input_ids


def test_nothing_is_asked_of_the_hub_without_a_reason(tiny: Path, tmp_path: Path, hub: LocalHub) -> None:
    source = copied(tiny, tmp_path / "source", written("config.json", "{"))
    assert run_cli("prune", source, "-o", tmp_path / "out", "--drop", 1, *QUICK, "--push-to-hub", "me/short").code == 2
    assert hub.requests == []
