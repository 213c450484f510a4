"""Pushes to a Hub on this machine, in this process and in one that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import QUICK, Outcome, copied, logits, run_cli, tiny_model, written
from helpers import ROOT, tiny_tokenizer
from huggingface_hub import ModelCard
from local_hub import FIRST, TOKEN, LocalHub

import sglp_llm
from sglp_llm.models.upload import ATTEMPTS, UploadError

SHARDS = 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several shards."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    tiny_model().save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer(bos=True).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) == SHARDS
    return folder


@pytest.fixture(scope="module")
def pruned(tiny: Path) -> Path:
    output = tiny.with_name("out")
    assert run_cli("prune", tiny, "-o", output, *QUICK, "--drop", 1, "--no-verify").code == 0
    return output


def without_token(outcome: Outcome) -> Outcome:
    assert TOKEN not in outcome.out + outcome.err
    return outcome


def pushed(*arguments: object) -> Outcome:
    return without_token(run_cli("push", *arguments))


def test_one_commit_and_the_address(pruned: Path, hub: LocalHub) -> None:
    outcome = pushed(pruned, "me/short")
    assert outcome == Outcome(0, f"Uploaded          {hub.address}/me/short\n", "")
    repository = hub.repositories["me/short"]
    assert repository.messages == ["initial commit", "Upload a model pruned with sglp-llm"]
    assert not repository.private
    here = {path.name: path.read_bytes() for path in pruned.iterdir()}
    there = repository.files()
    assert set(there) == {*here, *FIRST}
    changed = {"README.md", "sglp_plan.json", "sglp_recipe.yaml"}
    assert {name for name, content in here.items() if there[name] != content} == changed
    assert here == {path.name: path.read_bytes() for path in pruned.iterdir()}


def test_options(pruned: Path, hub: LocalHub) -> None:
    outcome = pushed(pruned, "short", "--revision", "exp/one", "--private", "--message", "First try", "--json")
    told = json.loads(outcome.out)
    repository = hub.repositories["me/short"]
    assert told == {
        "address": f"{hub.address}/me/short/tree/exp/one",
        "repository": "me/short",
        "revision": "exp/one",
        "commit": repository.branches["exp/one"],
    }
    assert repository.private
    assert repository.messages[1:] == ["First try"]
    assert set(repository.files("main")) == set(FIRST)
    assert 'from_pretrained("me/short")' in repository.files("exp/one")["README.md"].decode()


def test_python(pruned: Path, hub: LocalHub) -> None:
    done = sglp_llm.push(pruned, "me/short", revision="main")
    assert done.commit == hub.repositories["me/short"].branches["main"]


def test_pushed_again_nothing_is_sent_and_no_commit_made(pruned: Path, hub: LocalHub) -> None:
    first = json.loads(pushed(pruned, "me/short", "--json").out)
    before = len(hub.asked("PUT"))
    again = json.loads(pushed(pruned, "me/short", "--json").out)
    assert again == first
    assert len(hub.asked("PUT")) == before
    assert len(hub.repositories["me/short"].messages) == 2


def test_weights_of_an_earlier_push_go_and_other_files_stay(pruned: Path, tmp_path: Path, hub: LocalHub) -> None:
    assert pushed(pruned, "me/short").code == 0
    whole = tmp_path / "whole"
    assert run_cli("prune", pruned, "-o", whole, *QUICK, "--drop", 1, "--max-shard-size", "1GB").code == 0
    (whole / "sglp_recipe.yaml").unlink()
    (whole / "report.html").unlink()
    assert pushed(whole, "me/short").code == 0
    there = hub.repositories["me/short"].files()
    assert {name for name in there if name.startswith(("model", "sglp"))} == {"model.safetensors", "sglp_plan.json"}
    assert "report.html" in there


def test_the_card_is_valid_for_the_hub(pruned: Path, tmp_path: Path, hub: LocalHub) -> None:
    ModelCard.load(pruned / "README.md").validate()
    broken = copied(pruned, tmp_path / "broken", written("README.md", "---\nbase_model: /home/me/tiny\n---\n"))
    outcome = pushed(broken, "me/short")
    assert outcome.code == 1
    assert 'Invalid metadata in README.md. - "base_model" must be the id of a model' in outcome.error
    assert hub.asked("PUT") == hub.asked("/commit/") == []


@pytest.mark.parametrize("where", ["repos/create", "validate-yaml", "tree", "preupload", "batch", "PUT", "commit"])
@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_what_passes_is_tried_again(where: str, status: int, pruned: Path, hub: LocalHub) -> None:
    hub.fail(where, status, times=2)
    assert pushed(pruned, "me/short") == Outcome(0, f"Uploaded          {hub.address}/me/short\n", "")
    assert hub.failures[0].times == 0
    assert len(hub.repositories["me/short"].messages) == 2
    assert len(hub.asked("PUT")) == SHARDS + (2 if where == "PUT" else 0)
    assert sum(hub.waits) > 0


def test_the_hub_says_how_long_to_wait(pruned: Path, hub: LocalHub) -> None:
    hub.fail("repos/create", 429, Retry_After="37")
    hub.fail("repos/create", 503, Retry_After="9000")
    hub.fail("commit/", 429, RateLimit='"api";r=0;t=55')
    assert pushed(pruned, "me/short").code == 0
    assert hub.waits == [37.0, 300.0, 55.0]


def test_who_waits_is_told_why(pruned: Path, hub: LocalHub) -> None:
    hub.fail("commit/", 503)
    lines: list[str] = []
    sglp_llm.push(pruned, "me/short", notify=lines.append)
    (line,) = lines
    assert line.startswith("Server error '503 Service Unavailable'") or line.startswith("503 Server Error")
    assert line.endswith("; trying again in 2 s")
    assert "\n" not in line


def test_a_commit_whose_answer_is_lost_is_not_made_twice(pruned: Path, hub: LocalHub) -> None:
    hub.fail("commit/", 0, after=True)
    assert pushed(pruned, "me/short").code == 0
    assert len(hub.repositories["me/short"].messages) == 2


@pytest.mark.parametrize("where", ["repos/create", "PUT", "commit"])
def test_what_does_not_pass_is_one_line(where: str, pruned: Path, hub: LocalHub) -> None:
    here = {path.name: path.read_bytes() for path in pruned.iterdir()}
    hub.fail(where, 500, times=float("inf"))
    outcome = pushed(pruned, "me/short", "--private", "--message", "two words")
    assert outcome.code == 1
    assert outcome.error.startswith(f"{pruned} is complete, but the upload failed (")
    assert "500" in outcome.error
    assert "signed" not in outcome.error
    assert outcome.error.endswith(f"retry with: sglp-llm push {pruned} me/short --private --message 'two words'")
    assert len(hub.asked(where)) >= ATTEMPTS
    assert here == {path.name: path.read_bytes() for path in pruned.iterdir()}


@pytest.mark.parametrize("status", [400, 401, 403])
def test_what_will_not_pass_is_not_tried_again(status: int, pruned: Path, hub: LocalHub) -> None:
    hub.fail("commit/", status, times=float("inf"))
    assert ("Bad request" if status == 400 else f"{status} ") in pushed(pruned, "me/short").error
    assert len(hub.asked("commit/")) == 1
    assert hub.waits == []


def test_a_token_that_is_refused_and_one_that_no_header_can_hold(
    pruned: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token in ("hf_wrong", f"{TOKEN}\x01"):
        monkeypatch.setenv("HF_TOKEN", token)
        outcome = pushed(pruned, "me/short")
        assert outcome.code == 1
        assert token not in outcome.error
    assert hub.repositories == {}


def test_a_public_repository_is_not_taken_for_a_private_one(pruned: Path, hub: LocalHub) -> None:
    assert pushed(pruned, "me/short").code == 0
    commits = len(hub.repositories["me/short"].messages)
    assert "me/short exists and is public" in pushed(pruned, "me/short", "--private", "--message", "m").error
    assert len(hub.repositories["me/short"].messages) == commits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{out}/none", "me/short"), "no checkpoint here (config.json and weights)"),
        (("{out}", "a/b/c"), "the Hub repository: Repo id must be in the form"),
        (("{out}", "me/short", "--revision", "a" * 40), "is a commit, and nothing can be added to one"),
        (("{out}", "me/short", "--revision", "a..b"), "cannot be the name of a branch"),
        (("{out}", "me/short", "--revision", ""), "cannot be the name of a branch"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, pruned: Path, hub: LocalHub) -> None:
    outcome = pushed(*(each.format(out=pruned) for each in arguments))
    assert outcome.code == 2
    assert message in outcome.error
    assert hub.requests == []


def test_nobody_is_logged_in(pruned: Path, tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    for verb in (
        ("push", pruned, "me/x"),
        ("prune", pruned, "-o", tmp_path / "new", "--drop", 1, "--push-to-hub", "me/x"),
    ):
        outcome = run_cli(*verb)
        assert outcome.code == 2
        assert "me/x: nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN" in outcome.error
    assert hub.requests == []
    assert not (tmp_path / "new").exists()


def test_killed_and_pushed_again(pruned: Path, tmp_path: Path, hub: LocalHub) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-m", "sglp_llm", "push", str(pruned), "me/short"]
    options: dict[str, Any] = {"env": {**environment, "PYTHONPATH": str(ROOT)}, "text": True}
    hub.hold_after = 1
    process = subprocess.Popen(command, **options)
    assert hub.held.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.hold_after = None
    hub.released.set()
    assert len(hub.repositories["me/short"].messages) == 1
    (there,) = hub.objects
    hub.requests.clear()
    assert pushed(pruned, "me/short") == Outcome(0, f"Uploaded          {hub.address}/me/short\n", "")
    assert len(hub.asked("PUT")) == SHARDS - 1
    assert hub.asked(f"PUT /objects/{there}") == []
    assert len(hub.repositories["me/short"].messages) == 2


def test_prune_and_heal_push_what_they_have_written(tiny: Path, tmp_path: Path, hub: LocalHub) -> None:
    out = tmp_path / "out"
    outcome = run_cli("prune", tiny, "-o", out, *QUICK, "--drop", 1, "--no-verify", "--push-to-hub", "me/a", "--json")
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["output"] == str(out)
    assert without_token(outcome).err.endswith(f"Uploaded          {hub.address}/me/a\n")
    text = ("--data", f"text:{ROOT / 'LICENSE'}", "--tokens", 128, "--seq-len", 16, "--sequences", 2)
    outcome = run_cli("heal", out, "-o", tmp_path / "healed", *text, "--push-to-hub", "me/b", "--private")
    assert outcome.code == 0, outcome
    assert without_token(outcome).out.endswith(f"Uploaded          {hub.address}/me/b\n")
    assert hub.repositories["me/b"].private
    assert {"sglp_healing.json", "sglp_healing_recipe.yaml"} <= set(hub.repositories["me/b"].files())
    for name, content in [*hub.repositories["me/a"].files().items(), *hub.repositories["me/b"].files().items()]:
        assert str(tmp_path.parent).encode() not in content, name
        assert str(tiny.parent.parent).encode() not in content, name
        assert str(ROOT).encode() not in content, name
    # Here the original is still found by the plan.
    assert run_cli("heal", tmp_path / "healed", "-o", tmp_path / "again", *text, "--overwrite").code == 0
    assert run_cli("replan", tmp_path / "healed", "--drop", 2).code == 0


def test_a_failed_push_of_a_pruned_model(tiny: Path, tmp_path: Path, hub: LocalHub) -> None:
    hub.fail("repos/create", 500, times=float("inf"))
    out = tmp_path / "my model"
    outcome = run_cli("prune", tiny, "-o", out, *QUICK, "--drop", 1, "--no-verify", "--push-to-hub", "me/a")
    assert outcome.code == 1
    last = without_token(outcome).err.splitlines()[-1]
    assert last.startswith(f"sglp-llm: error: {out} is complete, but the upload failed (")
    assert last.endswith(f"retry with: sglp-llm push '{out}' me/a")
    hub.failures.clear()
    assert pushed(out, "me/a").code == 0


def test_the_error_in_python(pruned: Path, hub: LocalHub) -> None:
    hub.fail("commit/", 403)
    with pytest.raises(UploadError, match="is complete, but the upload failed"):
        sglp_llm.push(pruned, "me/short")


def test_what_was_pushed_is_pruned_again(pruned: Path, tmp_path: Path, hub: LocalHub) -> None:
    assert pushed(pruned, "me/short").code == 0
    outcome = run_cli("prune", "me/short", "-o", tmp_path / "again", *QUICK, "--drop", 1)
    assert outcome.code == 0, outcome
    plan = json.loads((tmp_path / "again" / "sglp_plan.json").read_text())
    assert plan["source"]["name"] == "me/short"
    assert plan["revision"] == hub.repositories["me/short"].branches["main"]
    assert ModelCard.load(tmp_path / "again" / "README.md").data.base_model == "me/short"
    assert logits(tmp_path / "again").equal(logits(pruned, skip=tuple(plan["removed"])))
