"""What is left of local paths in what is published."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglp_llm.plan.published import in_hub_cache, published_model, without_local_paths, without_paths

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/models/smol", "smol"),
        ("/home/me/my models/smol/", "smol"),
        ("~/models/smol.gguf", "smol.gguf"),
        ("../models/smol", "smol"),
        ("text:/home/me/a.txt", "text:a.txt"),
        ("text:data/a.txt", "text:a.txt"),
        ("text:/home/my own files/a b.txt", "text:a b.txt"),
        ("jsonl:/home/me/a.jsonl:field", "jsonl:a.jsonl:field"),
        ("text:/a/b.txt:1 wikitext2:train:2 chat:~/c/d.json:0.5", "text:b.txt:1 wikitext2:train:2 chat:d.json:0.5"),
        ("task:/suites/mine.yaml", "task:mine.yaml"),
        ("wikitext2 and c4", "wikitext2 and c4"),
        ("Salesforce/wikitext", "Salesforce/wikitext"),
        ("see https://huggingface.co/me/short, and/or 1/2", "see https://huggingface.co/me/short, and/or 1/2"),
        ("cannot read '/home/me/a.txt'", "cannot read 'a.txt'"),
        ("a / b", "a / b"),
        ("<script>x</script>", "<script>x</script>"),
    ],
)
def test_texts(text: str, shown: str) -> None:
    assert without_paths(text) == shown


NAME = st.text("abc xyz0189._-", min_size=1, max_size=8).filter(lambda name: name.strip(" .") == name)


@given(
    st.lists(NAME, min_size=1, max_size=4), NAME, st.sampled_from(["{}", "text:{}", "jsonl:{}:text", "text:{} c4:2"])
)
def test_no_folder_of_an_absolute_path_stays(folders: list[str], file: str, form: str) -> None:
    folders = [f"<{folder}>" for folder in folders]
    assert without_paths(form.format("/" + "/".join([*folders, file]))) == form.format(file)


def test_models_are_named_as_on_the_hub_where_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "smol").mkdir(parents=True)
    cached = f"/home/me/.cache/huggingface/hub/models--owner--some-name/snapshots/{COMMIT}"
    assert published_model("owner/name") == "owner/name"
    assert published_model("models/smol") == "smol"
    assert published_model("models/smol/..") == "models"
    assert published_model("gone/to/smol") == "smol"
    assert published_model("../smol") == published_model("./smol") == published_model("~/smol") == "smol"
    assert published_model(cached) == "owner/some-name"
    assert in_hub_cache(cached) == ("owner/some-name", COMMIT)
    assert in_hub_cache(cached.replace("owner--", "")) == ("some-name", COMMIT)
    assert in_hub_cache(str(tmp_path)) is None
    plan = {"source": {"name": cached, "model_type": "llama", "fingerprint": "sha256:0"}, "revision": None}
    assert without_local_paths(plan) == {"source": {**plan["source"], "name": "owner/some-name"}, "revision": COMMIT}
    assert without_local_paths({"model": cached}) == {"model": "owner/some-name", "revision": COMMIT}


def test_data_keeps_everything_else() -> None:
    data = {
        "model": "/home/me/smol",
        "heal": {"teacher": "/home/me/big", "scratch": "relative/scratch", "tokens": 3, "distil": True},
        "journal": "runs/journal",
        "options": {"search": {"objective": "task:/home/me/mine.yaml", "steps": [1, 2.5, None]}},
        "student": {"name": "out.pruned", "model_type": "llama", "fingerprint": "sha256:0"},
    }
    assert without_local_paths(data) == {
        "model": "smol",
        "heal": {"teacher": "big", "scratch": "scratch", "tokens": 3, "distil": True},
        "journal": "journal",
        "options": {"search": {"objective": "task:mine.yaml", "steps": [1, 2.5, None]}},
        "student": {"name": "out.pruned", "model_type": "llama", "fingerprint": "sha256:0"},
    }
